"""The device's settings: `device.toml` in its folder, each overridable by an option."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from broker_bridge.limits import LIMITS
from broker_bridge.link.access import Login
from device_client.eligibility import Rules

__all__ = ["EXAMPLE", "DeviceConfig"]


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may stand in `device.toml`."""

    data: str = ""
    role: Literal["train", "evaluate"] = "train"
    broker_host: str = ""
    broker_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    broker: Login = Login()
    keepalive_s: Annotated[int, Meta(ge=10, le=65_535)] = 60
    mqtt: Literal["auto", "5.0", "3.1.1"] = "auto"
    packet_bytes_max: Annotated[
        int, Meta(ge=LIMITS.packet_bytes_min, le=LIMITS.packet_bytes_max)
    ] = LIMITS.packet_bytes_max
    inflight_max: Annotated[int, Meta(ge=1, le=LIMITS.inflight_max)] = LIMITS.inflight_max
    publishes_per_s: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    memory_mb: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    stall_s: Annotated[float, Meta(ge=1, le=86_400)] = 300.0
    log: Literal["debug", "info", "warning", "error"] = "info"
    keep_model: bool = True
    personal_epochs: Annotated[int, Meta(ge=0, le=1000)] = 0
    eligibility: Rules = Rules()


EXAMPLE = """\
# midge-device: the settings of this device. Remove the # to change one.
# Each can be set for one run: `midge-device run --set keepalive_s=300`.

# Where the samples come from: npz:FILE, csv:FOLDER, store:FILE, module:function or
# FILE.py:function.
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

# The most memory that training may take, samples included, in MB (0: half of the machine's),
# and how long one step may take before training counts as hung and is ended, in seconds.
# memory_mb = 0
# stall_s = 300.0

# debug, info, warning or error
# log = "info"

# Whether to keep the newest model for this device's own programs: `midge-device infer`,
# `midge-device predict`, device_client.model.Model. After a round with an update of this
# device it costs one more fetch of the model, unless the next round begins at once.
# keep_model = true

# Train each model that is kept on from there, for so many epochs, on local samples, for this
# device's own programs alone. It is used if it does better on a fifth of them, held out.
# personal_epochs = 0

# When this device may work. What is not set does not matter; what is set and cannot be read
# on this machine counts as not fulfilled (`midge-device status` shows each). Training stops
# within one step when a rule no longer holds, and begins again in the same round if it can.
[eligibility]
# mains = false            # true: only on mains power
# battery_min = 0.0        # 0.4: with 40 % of its battery or more
# temperature_max_c = 0.0  # 75.0: while the hottest zone has at most that
# throttled = true         # false: not while the processor is throttled (Raspberry Pi)
# load_max = 0.0           # 0.7: while at most that many processes want each core
# memory_min_mb = 0.0
# disk_min_mb = 0.0
# metered = true           # false: not over a network that NetworkManager calls metered
# networks = []            # ["eth0", "wlan0"]: over these only
# hours = []               # ["22:00-06:00"]: then only
# samples_min = 0
# unless_file = ""         # "/run/in-use": not while this file is there

# What a broker that midge did not set up wants, when it is not what the bundle said: a new
# password, for example. Paths begin in this file's folder; passwords and keys are of mode 0600.
[broker]
# ca = "system"                  # or a PEM file
# username = "{name}"            # {name}: this device's
# password_file = "broker.password"
# certificate = "broker.pem"     # a client certificate that the broker knows, and its key
# key = "broker.key"
# client_id = "{name}-{random}"
"""
