"""The broker of a simulation: every publish is seen by an observer, and is a point to crash at."""

import random
from collections.abc import Callable
from typing import Any

from broker_bridge.link.base import LinkLimits, Message
from broker_bridge.link.memory_link import MemoryBroker, MemoryLink

__all__ = ["WatchedBroker"]

# Small packets, so that small models travel in several.
PACKET_BYTES = 1536
REMEMBERED_MAX = 400


class WatchedBroker(MemoryBroker):
    """A MemoryBroker that remembers, to replay, and can be away or calm."""

    def __init__(self, *, draw: random.Random, **trouble: Any) -> None:
        super().__init__(seed=draw.getrandbits(32), limits=LinkLimits(PACKET_BYTES, 20), **trouble)
        self.observe: Callable[[Message], None] = lambda _: None
        self.strike: Callable[[str, str], None] = lambda *_: None
        self.away_until_s = 0.0
        self._draw = draw
        self._said: list[Message] = []

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

    def calm(self) -> None:
        """Lose, repeat, delay and reorder nothing from now on; new sessions mend what was lost."""
        self._loss = self._repeat = self._delay_s = self._reorder = 0.0
        self.leave(1.0, keep=True)
