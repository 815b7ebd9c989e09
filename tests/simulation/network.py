"""The broker of a simulation: every publish is seen by an observer, and is a point to crash at."""

import random
import re
from collections.abc import Callable
from typing import Any

from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.link.memory_link import MemoryBroker, MemoryLink

__all__ = ["WatchedBroker"]

# Small packets, so that small models travel in several.
PACKET_BYTES = 1536
LARGE_PACKET_BYTES = 4096  # an update fits into one
REMEMBERED_MAX = 400
_SEALED = re.compile(r"/(round|task/\d+|model/\d+|up/.*|down/.*)$")


class WatchedBroker(MemoryBroker):
    """A MemoryBroker that remembers, to replay, and can be away or calm."""

    def __init__(self, *, draw: random.Random, **trouble: Any) -> None:
        super().__init__(seed=draw.getrandbits(32), limits=LinkLimits(PACKET_BYTES, 20), **trouble)
        self.observe: Callable[[Message], None] = lambda _: None
        self.strike: Callable[[str, str], None] = lambda *_: None
        self.away_until_s = 0.0
        self._draw = draw
        self._said: list[Message] = []
        self._copy: tuple[dict[str, Message], dict[str, dict[str, None]]] = ({}, {})

    def route(self, message: Message) -> None:
        self.strike("publish", message.topic)
        self.observe(message)
        super().route(message)
        if len(self._said) < REMEMBERED_MAX:
            self._said.append(message)
        self.strike("published", message.topic)

    @property
    def is_here(self) -> bool:
        return self.now_s >= self.away_until_s

    def links(self) -> list[MemoryLink]:
        """Who is connected."""
        found = [session.link for session in self._sessions.values()]
        return [link for link in found if link is not None]

    def leave(self, seconds: float, *, keep: bool) -> None:
        """Die, stay away, and come back with what it kept."""
        self.away_until_s = self.now_s + seconds
        for link in self.links():
            link.cut("the broker is gone", away_s=seconds, abruptly=False)
        if not keep:
            self._sessions.clear()
            self.retained.clear()

    def replay(self) -> None:
        """Say something old again, as whoever owns the broker may."""
        if self._said:
            super().route(self._draw.choice(self._said))

    def corrupt(self) -> None:
        """Say something signed or sealed again, with one bit changed."""
        sealed = [m for m in self._said if _SEALED.search(m.topic) and m.payload]
        if sealed:
            old = self._draw.choice(sealed)
            payload = bytearray(old.payload)
            payload[self._draw.randrange(len(payload))] ^= 1 << self._draw.randrange(8)
            super().route(Message(old.topic, bytes(payload), old.retained))

    def copy(self) -> None:
        """Save what is kept, as a broker does now and then."""
        filters = {name: dict(session.filters) for name, session in self._sessions.items()}
        self._copy = dict(self.retained), filters

    def rewind(self, seconds: float) -> None:
        """Die, and come back with what was last saved: it resumes sessions, and is wrong."""
        self.leave(seconds, keep=True)
        self.retained, filters = dict(self._copy[0]), self._copy[1]
        for name, session in list(self._sessions.items()):
            if name not in filters:
                del self._sessions[name]
                continue
            session.filters = dict(filters[name])
            session.waiting.clear()
            session.unacknowledged.clear()

    def calm(self) -> None:
        """Lose, repeat, delay and reorder nothing from now on; new sessions mend what was lost."""
        self._loss = self._repeat = self._delay_s = self._reorder = 0.0
        self.leave(1.0, keep=True)
