"""Mallory owns the broker: she sees every message, and what she likes arrives instead of it.

`Mallory` is a broker whose every publish goes through `meddle`. The rest of this file is
what she may do to one message. She has no key of the federation, or she would not need
the broker; she has keys of her own, and signs with them.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from broker_bridge.link.base import Message
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.wire import batch
from broker_bridge.wire.envelope import SignKey
from broker_bridge.wire.topics import DeviceState, DownTopic, Topics, UpTopic

__all__ = ["TRICKS", "Mallory", "kind_of"]

FEDERATION = "demo"
TOPICS = Topics(FEDERATION)
OWN_KEY = SignKey.from_seed(b"mallory" + bytes(25))
SIGNATURE_BYTES = 64
REMEMBERED_MAX = 3000
HELD_MAX = 6

Trick = Callable[["Mallory", Message], list[Message]]


class Mallory(MemoryBroker):
    """A broker that does `trick` to every message of the kinds it is `against`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.draw = random.Random(1)
        self.trick: Trick | None = None
        self.against: frozenset[str] = frozenset()
        self.seen: list[Message] = []  # what was truly said
        self.by_kind: dict[str, list[Message]] = defaultdict(list)
        self.held: list[Message] = []
        self.meddled = 0

    def route(self, message: Message) -> None:
        """Let a message through, or what she makes of it."""
        kind = kind_of(message.topic)
        arriving = [message]
        if self.trick is not None and kind in self.against and message.payload:
            arriving = self.trick(self, message)
            self.meddled += 1
        self.seen.append(message)
        if message.payload and len(self.by_kind[kind]) < REMEMBERED_MAX:
            self.by_kind[kind].append(message)
        for each in arriving:
            super().route(each)

    def say(self, message: Message) -> None:
        """Put a message of her own before everyone."""
        super().route(message)

    def whisper(self, client_id: str, message: Message) -> None:
        """Tell one client what nobody else hears."""
        self._deliver(self._sessions[client_id], message)

    def earlier(self, kind: str) -> Message | None:
        """Something of this kind that was said before."""
        return self.draw.choice(self.by_kind[kind]) if self.by_kind[kind] else None


def kind_of(topic: str) -> str:
    """What a message is: `up join`, `down ack`, `state`, `round`, `model` …"""
    match TOPICS.parse(topic):
        case UpTopic(kind=kind):
            return f"up {kind}"
        case DownTopic(kind=kind):
            return f"down {kind}"
        case DeviceState():
            return "state"
        case str(kind):
            return kind
    raise AssertionError(topic)


# ── What can be done to one message ─────────────────────────────────────────────────────


def lose(mallory: Mallory, message: Message) -> list[Message]:
    """It never arrives."""
    return []


def repeat(mallory: Mallory, message: Message) -> list[Message]:
    """It arrives three times."""
    return [message] * 3


def flip(mallory: Mallory, message: Message) -> list[Message]:
    """One bit of it is another."""
    payload = bytearray(message.payload)
    payload[mallory.draw.randrange(len(payload))] ^= 1 << mallory.draw.randrange(8)
    return [_with(message, bytes(payload))]


def cut(mallory: Mallory, message: Message) -> list[Message]:
    """Its end is missing."""
    return [_with(message, message.payload[: mallory.draw.randrange(len(message.payload))])]


def grow(mallory: Mallory, message: Message) -> list[Message]:
    """Something follows it."""
    return [_with(message, message.payload + b"\0")]


def swap(mallory: Mallory, message: Message) -> list[Message]:
    """Another message of its kind comes in its place: an older one, or another device's."""
    other = mallory.earlier(kind_of(message.topic))
    return [message if other is None else _with(message, other.payload)]


def replay(mallory: Mallory, message: Message) -> list[Message]:
    """Before and after it, something old is said again, where it was said."""
    older = [mallory.earlier(kind_of(message.topic)) for _ in range(2)]
    first, last = ([m] if m is not None else [] for m in older)
    return [*first, message, *last]


def hold(mallory: Mallory, message: Message) -> list[Message]:
    """It comes late, and in another order."""
    mallory.held.append(message)
    if len(mallory.held) < HELD_MAX:
        return []
    late, mallory.held = mallory.held, []
    mallory.draw.shuffle(late)
    return late


def forge(mallory: Mallory, message: Message) -> list[Message]:
    """What it says, signed by somebody else."""
    kind = message.topic.rsplit("/", 1)[-1]
    place = TOPICS.parse(message.topic)
    scope = f"{FEDERATION}/{place.device}" if isinstance(place, UpTopic | DownTopic) else FEDERATION
    if kind == "ack":
        said = batch.split(message.payload).payload
        return [_with(message, batch.sign_together(OWN_KEY, [(f"{kind} {scope}", said)])[0])]
    said = message.payload[SIGNATURE_BYTES:]
    return [_with(message, OWN_KEY.sign(f"{kind} {scope}", said))]


def misdirect(mallory: Mallory, message: Message) -> list[Message]:
    """It goes to another device, or seems to come from one."""
    topic = message.topic
    for a, b in (("/ann/", "/ben/"), ("/ben/", "/cat/"), ("/cat/", "/ann/")):
        if a in topic:
            return [Message(topic.replace(a, b), message.payload, message.retained)]
    return [message]


TRICKS: dict[str, Trick] = {
    trick.__name__: trick
    for trick in (lose, repeat, flip, cut, grow, swap, replay, hold, forge, misdirect)
}


def _with(message: Message, payload: bytes) -> Message:
    return Message(message.topic, payload, message.retained)
