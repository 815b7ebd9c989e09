"""The server's settings: `midge.toml` in the fleet's folder, each overridable by an option."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from broker_bridge.limits import LIMITS
from broker_bridge.link.access import Login

__all__ = ["EXAMPLE", "ServerConfig"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Broker(Login, frozen=True, kw_only=True):
    """Where the broker is, for the server and in the bundles of devices; and who we are to it,
    if it is not midge's own: the server in this table, the others in their own.
    """

    host: str = "localhost"
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8883
    keepalive_s: Annotated[int, Meta(ge=5, le=65_535)] = 30
    mqtt: Literal["auto", "5.0", "3.1.1"] = "auto"
    packet_bytes_max: Annotated[
        int, Meta(ge=LIMITS.packet_bytes_min, le=LIMITS.packet_bytes_max)
    ] = LIMITS.packet_bytes_max
    inflight_max: Annotated[int, Meta(ge=1, le=LIMITS.server_inflight_max)] = (
        LIMITS.server_inflight_max
    )
    publishes_per_s: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    operator: Login = Login()
    devices: Login = Login()

    @property
    def is_foreign(self) -> bool:
        """Whether somebody gets in with what midge did not make, and cannot take back."""
        return self.says_who or self.devices.says_who

    def login(self, table: str) -> Login:
        """What stands in the `table` `broker`, `broker.operator` or `broker.devices`, with what
        it takes over: the CA, and an operator who says nothing of himself is the server there.
        """
        server = Login(**{each: getattr(self, each) for each in Login.__struct_fields__})
        if table == "broker":
            return server
        said = self.operator if table == "broker.operator" else self.devices
        said = msgspec.structs.replace(said, ca=said.ca or self.ca)
        if table == "broker.devices" or said.says_who:
            return said
        # Not the client id: the broker would take the two for one, and cut the older one off.
        return msgspec.structs.replace(server, ca=said.ca, client_id=said.client_id)


class Rounds(_Table, frozen=True, kw_only=True):
    """How rounds go, unless the start says otherwise."""

    target: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    quorum: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    deadline_s: Annotated[float, Meta(gt=0, le=1e7)] = 600.0
    abandoned_max: Annotated[int, Meta(ge=1, le=1000)] = 3
    evaluation_wait_s: Annotated[float, Meta(ge=0, le=3600)] = 60.0
    delta_bound: Annotated[float, Meta(gt=0, le=1e9)] = 1000.0
    weight_max: Annotated[int, Meta(ge=1, le=LIMITS.examples_max)] = 100_000
    fraction_bits: Annotated[int, Meta(ge=8, le=40)] = 32


class Training(_Table, frozen=True, kw_only=True):
    """What devices do in a round; a setting left out is the task's own default."""

    epochs: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    learning_rate: Annotated[float, Meta(gt=0, le=1e3)] | None = None
    proximal_mu: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    clip_norm: Annotated[float, Meta(ge=0, le=1e9)] | None = None


class Aggregation(_Table, frozen=True, kw_only=True):
    """How the mean of the updates becomes the next model."""

    optimiser: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    learning_rate: Annotated[float, Meta(gt=0, le=1e3)] = 1.0


class Evaluation(_Table, frozen=True, kw_only=True):
    """Held-out samples on the server; without them, devices in the role `evaluate` are asked."""

    npz: str = ""


class Limits(_Table, frozen=True, kw_only=True):
    """What devices may take up of the server, each and together."""

    uploads_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 2000
    control_per_minute: Annotated[float, Meta(ge=1, le=1e9)] = 120.0
    repeats_max: Annotated[int, Meta(ge=1, le=1000)] = 8
    spool_mb_max: Annotated[int, Meta(ge=0, le=10**9)] = 0
    disk_free_mb_min: Annotated[int, Meta(ge=0, le=10**9)] = 64


class ServerConfig(_Table, frozen=True, kw_only=True):
    """What may stand in `midge.toml`."""

    federation: str = "demo"
    tasks: tuple[str, ...] = ()
    models_kept: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    log: Literal["debug", "info", "warning", "error"] = "info"
    broker: Broker = Broker()
    rounds: Rounds = Rounds()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    limits: Limits = Limits()


EXAMPLE = """\
# midge: the settings of this federation. Remove the # to change one.
# Each can be set for one run: `midge server --set rounds.deadline_s=60`.

federation = "{federation}"

# Task files (made by `midge task build`) that a start may name. Those in the folder
# tasks/ beside this file are found without being listed.
# tasks = ["/path/to/my.task"]

# How many versions of the model to keep on disk.
# models_kept = 20

# debug, info, warning or error
# log = "info"

[broker]
# Where devices and server find the broker. The name must be in the broker's certificate.
host = "{host}"
port = {port}
# keepalive_s = 30
# The version of MQTT: "auto" tries 5.0, then 3.1.1.
# mqtt = "auto"
# What the broker takes, for brokers that do not say (MQTT 3.1.1) or discard what comes faster;
# docs/brokers.md has their figures. Models and updates are cut into packets of this size, and
# devices hear of it. No more than inflight_max publishes wait for the broker's answer, and no more
# than 20 where it does not say. 0 publishes in a second: as many as the broker acknowledges.
# packet_bytes_max = 61440
# inflight_max = 200
# publishes_per_s = 0.0
#
# For a broker that midge did not set up (docs/brokers.md). `{{name}}` is a device's name,
# midge-server or midge-operator; paths begin in this file's folder. The CA that certified the
# broker: a PEM file, or "system" for those that this machine trusts.
# ca = "system"
# A user name, and a file of mode 0600 with the password in its only line:
# username = "{{name}}"
# password_file = "logins/{{name}}"
# Or a client certificate that the broker knows:
# certificate = "logins/{{name}}.pem"
# key = "logins/{{name}}.key"
# How we call ourselves there, if the broker has rules about that.
# client_id = "{{name}}-{{random}}"

# Operators' commands there; the same settings. Without a name of their own they take the server's.
# [broker.operator]

# What the bundles of devices carry for that broker; the same settings.
# [broker.devices]

[rounds]
# How many updates make a round; 0: one from each training device that is online.
# target = 0
# How many are enough at the deadline; 0: half of the target.
# quorum = 0
# deadline_s = 600.0
# A run ends as failed after so many abandoned rounds in a row.
# abandoned_max = 3
# How long to wait for devices that evaluate.
# evaluation_wait_s = 60.0
# No update may be larger than this (L2 norm); devices scale theirs down to it.
# delta_bound = 1000.0
# No device counts for more examples than this.
# weight_max = 100000
# Updates are summed exactly, in steps of 2^-fraction_bits.
# fraction_bits = 32

[training]
# What devices do in a round; a setting left out is the task's own default.
# epochs = 1
# learning_rate = 0.05
# proximal_mu = 0.0
# clip_norm = 0.0

[aggregation]
# fedavg, fedavgm, fedadam or fedyogi
# optimiser = "fedavg"
# learning_rate = 1.0

[limits]
# How many uploads may be open at once, over all devices; further ones are told to wait.
# uploads_max = 2000
# How many messages (chunks aside) a device may send in a minute; the rest is dropped.
# control_per_minute = 120.0
# How many times over a device may send its update in one round; the rest is dropped.
# repeats_max = 8
# The most that the sealed updates of a round may take on disk, in MB; 0: what the disk has.
# spool_mb_max = 0
# Take no updates while the disk has less room than this, in MB: models and receipts need it.
# disk_free_mb_min = 64

[evaluation]
# Held-out samples to measure each new model on, here on the server. Without them, devices
# run with --role evaluate measure it on their own data.
# npz = "held-out.npz"
"""
