"""The device's settings: `device.toml` in its folder, each overridable by an option."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ["EXAMPLE", "DeviceConfig"]


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may stand in `device.toml`."""

    data: str = ""
    role: Literal["train", "evaluate"] = "train"
    broker_host: str = ""
    broker_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    keepalive_s: Annotated[int, Meta(ge=10, le=65_535)] = 60
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

# Processor threads for training. One is fastest for small models.
# threads = 1

# debug, info, warning or error
# log = "info"
"""
