"""The device's settings: `device.toml` in its folder, each overridable by an option."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from broker_bridge.limits import LIMITS

__all__ = ["EXAMPLE", "DeviceConfig"]


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may stand in `device.toml`."""

    data: str = ""
    role: Literal["train", "evaluate"] = "train"
    broker_host: str = ""
    broker_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    keepalive_s: Annotated[int, Meta(ge=10, le=65_535)] = 60
    mqtt: Literal["auto", "5.0", "3.1.1"] = "auto"
    packet_bytes_max: Annotated[
        int, Meta(ge=LIMITS.packet_bytes_min, le=LIMITS.packet_bytes_max)
    ] = LIMITS.packet_bytes_max
    inflight_max: Annotated[int, Meta(ge=1, le=LIMITS.inflight_max)] = LIMITS.inflight_max
    publishes_per_s: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    log: Literal["debug", "info", "warning", "error"] = "info"


EXAMPLE = """\
# midge-device: the settings of this device. Remove the # to change one.
# Each can be set for one run: `midge-device run --set keepalive_s=300`.

# Where the samples come from: npz:FILE, csv:FOLDER, module:function or FILE.py:function.
# data = "npz:/var/lib/sensor/samples.npz"

# "train" sends updates. "evaluate" never trains: it measures each new model on its own
# data and reports counts and means only.
# role = "train"

# Where the broker is, when it is not where the bundle said (0 and "" mean: as enrolled).
# broker_host = ""
# broker_port = 0

# How often to say "still here" over an idle connection, in seconds. 60 costs about
# 6 kB of MQTT a day; more is cheaper, less notices a dead connection sooner.
# keepalive_s = 60

# The version of MQTT: "auto" tries 5.0, then 3.1.1.
# mqtt = "auto"

# What the broker takes, if it does not say (MQTT 3.1.1) or discards what comes faster. The
# server tells each device how large a packet may be; set it here only for a broker of another
# kind than the server's. 0 publishes in a second: as many as the broker acknowledges.
# packet_bytes_max = 61440
# inflight_max = 20
# publishes_per_s = 0.0

# Processor threads for training. One is fastest for small models.
# threads = 1

# debug, info, warning or error
# log = "info"
"""
