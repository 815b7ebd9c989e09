"""Everything the broker carries, as the broker sees it."""

from collections import defaultdict
from dataclasses import dataclass, field

from broker_bridge.errors import PeerError
from broker_bridge.link.base import Link, Message
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Presence, RoundSummary
from broker_bridge.wire.topics import DeviceState, DownTopic, Topics, UpTopic

__all__ = ["Traffic"]


@dataclass
class Traffic:
    """What was counted and kept of it."""

    topics: Topics
    up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    retained_bytes: int = 0
    sealed: list[bytes] = field(default_factory=list)
    states: dict[str, Presence] = field(default_factory=dict)
    summaries: list[RoundSummary] = field(default_factory=list)
    server_online: bool = False
    joined: set[str] = field(default_factory=set)
    sealed_by: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def take(self, message: Message) -> None:
        """Look at one message."""
        size = len(message.payload) + len(message.topic)
        try:
            place = self.topics.parse(message.topic)
        except PeerError:
            return
        match place:
            case UpTopic(device=device, kind=kind):
                self.up[device] += size
                self.sealed.append(message.payload)
                if kind == "join":
                    self.joined.add(device)
                if kind == "init":
                    self.sealed_by.add(device)
            case DownTopic(device=device, kind=kind):
                self.down[device] += size
                if kind == "ack":
                    self.done.add(device)
            case "task" | "model":
                self.retained_bytes += size
                self.sealed.append(message.payload)
            case DeviceState(device) if message.payload:
                self.states[device] = messages.decode_json(message.payload, Presence)
            case "metrics" if not message.retained:
                self.summaries.append(messages.decode_json(message.payload, RoundSummary))
                self.joined, self.sealed_by, self.done = set(), set(), set()
            case "srv":
                self.server_online = b'"online"' in message.payload

    def count(self, *states: str) -> int:
        """How many devices are in one of these states."""
        return sum(p.state in states for p in self.states.values())

    @property
    def bytes_total(self) -> int:
        """Payloads and topics published."""
        return sum(self.up.values()) + sum(self.down.values()) + self.retained_bytes

    def look(self, eye: Link, timeout_s: float) -> bool:
        """Take what `eye` sees next; whether there was anything in that time."""
        event = eye.receive(timeout_s)
        if isinstance(event, Message):
            self.take(event)
            eye.ack(event)
        return event is not None
