"""Every topic midge speaks on: built and taken apart here, and nowhere else.

    midge/v1/{fed}/ctl · ctl/reply · srv · round · metrics · identity
    midge/v1/{fed}/task/{seq} · model/{seq}
    midge/v1/{fed}/dev/{dev}/state
    midge/v1/{fed}/up/{shard}/{dev}/{kind}      enrol renew join init data need report
    midge/v1/{fed}/down/{dev}/{kind}            go need ack cfg

A level is `[a-z0-9-]`, not starting or ending with `-`: safe as an X.509 common
name and on every broker we know. Six slashes at most (AWS IoT Core allows seven).
Round, upload and sequence numbers live in payloads, never in topics, but for the
index of a retained chunk, which is what retains it.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import msgspec

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS

__all__ = [
    "DOWN_KINDS",
    "OPERATOR",
    "RESERVED",
    "SERVER",
    "UP_KINDS",
    "DeviceState",
    "DownTopic",
    "Topics",
    "UpTopic",
    "is_name",
]

SERVER = "midge-server"
OPERATOR = "midge-operator"
RESERVED = frozenset({SERVER, OPERATOR, "midge-broker"})

UP_KINDS = frozenset({"enrol", "renew", "join", "init", "data", "need", "report"})
DOWN_KINDS = frozenset({"go", "need", "ack", "cfg"})

_ROOT = "midge/v1"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")


def is_name(text: str) -> bool:
    """Say whether `text` can be one level of a topic: `[a-z0-9-]`, 1 to 40 characters."""
    return len(text) <= LIMITS.name_chars_max and _NAME.fullmatch(text) is not None


class UpTopic(msgspec.Struct, frozen=True):
    """From a device to the server. The device's name is what the broker's ACL let through."""

    shard: int
    device: str
    kind: str


class DownTopic(msgspec.Struct, frozen=True):
    """From the server to one device."""

    device: str
    kind: str


class DeviceState(msgspec.Struct, frozen=True):
    """A device's retained presence."""

    device: str


Parsed = UpTopic | DownTopic | DeviceState | str


@dataclass(frozen=True)
class Topics:
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        if not is_name(self.federation):
            raise ValueError(f"not a federation name: {self.federation!r}")

    @cached_property
    def _prefix(self) -> str:
        return f"{_ROOT}/{self.federation}/"

    def _at(self, *levels: str) -> str:
        return self._prefix + "/".join(levels)

    @property
    def ctl(self) -> str:
        """Operator to server, JSON."""
        return self._at("ctl")

    @property
    def ctl_reply(self) -> str:
        """Server to operator, JSON."""
        return self._at("ctl", "reply")

    @property
    def srv(self) -> str:
        """The server's presence, JSON, retained, with a last will."""
        return self._at("srv")

    @property
    def round(self) -> str:
        """The signed announcement, retained."""
        return self._at("round")

    @property
    def metrics(self) -> str:
        """The last round's summary, JSON, retained."""
        return self._at("metrics")

    @property
    def identity(self) -> str:
        """The server's identity as signed by the root, retained."""
        return self._at("identity")

    def task(self, index: int) -> str:
        """One retained chunk of the task."""
        return self._at("task", str(index))

    def model(self, index: int) -> str:
        """One retained chunk of the global model."""
        return self._at("model", str(index))

    def state(self, device: str) -> str:
        """A device's retained presence, JSON, with a last will."""
        return self._at("dev", device, "state")

    def up(self, shard: int, device: str, kind: str) -> str:
        """From `device` to the server."""
        return self._at("up", str(shard), device, kind)

    def down(self, device: str, kind: str) -> str:
        """From the server to `device`."""
        return self._at("down", device, kind)

    @property
    def all_tasks(self) -> str:
        """Filter for every chunk of the task."""
        return self._at("task", "+")

    @property
    def all_models(self) -> str:
        """Filter for every chunk of the model."""
        return self._at("model", "+")

    @property
    def all_states(self) -> str:
        """Filter for every device's presence."""
        return self._at("dev", "+", "state")

    def all_up(self, shard: int) -> str:
        """Filter for whatever devices send to one shard of the server."""
        return self._at("up", str(shard), "+", "+")

    def all_down(self, device: str) -> str:
        """Filter for whatever the server sends to `device`."""
        return self._at("down", device, "+")

    def parse(self, topic: str) -> Parsed:
        """Take a topic apart; a plain string is a topic without names.

        Raises PeerError `bad_topic` for anything that this federation does not speak.
        """
        if not topic.startswith(self._prefix):
            raise PeerError("bad_topic", "a topic of another federation")
        match topic[len(self._prefix) :].split("/"):
            case ["up", shard, device, kind] if kind in UP_KINDS and is_name(device):
                return UpTopic(_index(shard), device, kind)
            case ["down", device, kind] if kind in DOWN_KINDS and is_name(device):
                return DownTopic(device, kind)
            case ["dev", device, "state"] if is_name(device):
                return DeviceState(device)
            case [("task" | "model") as blob, seq]:
                _index(seq)
                return blob
            case ["ctl", "reply"]:
                return "ctl/reply"
            case [("ctl" | "srv" | "round" | "metrics" | "identity") as plain]:
                return plain
        raise PeerError("bad_topic", "no such topic in this protocol")


def _index(level: str) -> int:
    if level.isascii() and level.isdecimal() and len(level) <= 5:
        return int(level)
    raise PeerError("bad_topic", "a sequence number was expected in the topic")
