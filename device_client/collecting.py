"""Task and model on their way from the broker: subscribed to, put together, and opened."""

from dataclasses import dataclass
from typing import Literal

from broker_bridge.errors import PeerError
from broker_bridge.link.base import Link
from broker_bridge.wire import blobs
from broker_bridge.wire.chunks import Reassembler
from broker_bridge.wire.messages import Blob
from broker_bridge.wire.topics import Topics

__all__ = ["Collected", "Collecting"]

Kind = Literal["task", "model"]


@dataclass(frozen=True)
class Collected:
    """A task or model that is complete; its digest is the announced one."""

    kind: Kind
    blob: Blob
    content: bytes


@dataclass(frozen=True)
class _Pieces:
    """What is here of one so far."""

    blob: Blob
    fleet_key: bytes
    here: Reassembler


class Collecting:
    """At most one task and one model at a time."""

    def __init__(self, topics: Topics) -> None:
        self._filters = {"task": topics.all_tasks, "model": topics.all_models}
        self._wanted: dict[Kind, _Pieces] = {}

    def missing(self) -> dict[Kind, list[int]]:
        """Which chunks are still to come, of what is on its way."""
        return {kind: list(pieces.here.missing()) for kind, pieces in self._wanted.items()}

    def begin(self, kind: Kind, blob: Blob, *, fleet_key: bytes) -> None:
        """Wait for `blob`, from its first chunk, and not for the one before.

        Raises PeerError for one that nobody can send; nothing has changed then.
        """
        self._wanted[kind] = _Pieces(blob, fleet_key, blobs.collector(blob, fleet_key=fleet_key))

    def ask(self, link: Link, kind: Kind) -> None:
        """Have the broker send all of it, if we wait for it."""
        if kind in self._wanted:
            link.subscribe([self._filters[kind]])

    def take(self, link: Link, kind: Kind, chunk: bytes) -> Collected | Literal["more"] | None:
        """One more chunk; None for one that nobody waits for.

        Raises PeerError for what is forged. What was complete and wrong begins from the start.
        """
        wanted = self._wanted.get(kind)
        if wanted is None:
            return None
        try:
            complete = wanted.here.add(chunk)
        except PeerError as error:
            if error.reason == "other_transfer":
                return None  # a chunk of the version before: the new one follows
            raise
        if not complete:
            return "more"
        try:
            content = blobs.finish(wanted.blob, wanted.here)
        except PeerError:
            self.begin(kind, wanted.blob, fleet_key=wanted.fleet_key)  # it is asked for again
            raise
        self.stop(link, kind)
        return Collected(kind, wanted.blob, content)

    def stop(self, link: Link, *kinds: Kind) -> None:
        """Wait no more for these."""
        for kind in kinds:
            if self._wanted.pop(kind, None) is not None:
                link.unsubscribe([self._filters[kind]])
