"""A sealed update on its way: which of its chunks the server lacks, and how many may go now."""

from collections import deque

from broker_bridge.limits import LIMITS
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, missing_in
from broker_bridge.wire.messages import Go, Init, Need
from device_client.events import LinkUp

__all__ = ["Sending"]


class Sending:
    """One update in the outbox. `init` is its commit, which goes first."""

    def __init__(self, init: Init, go: Go | None) -> None:
        """`go` let it in; None for an update that was found in the outbox at start."""
        self.init = init
        self._go = go
        self._missing: deque[int] = deque()

    @property
    def is_asked_for(self) -> bool:
        """Whether the server waits for chunks that are still to go."""
        return bool(self._missing)

    def is_too_large(self, link: LinkUp) -> bool:
        """Whether the broker takes smaller packets by now than the update was cut for."""
        if link.packet_bytes_max == 0:
            return False
        body_bytes = min(self.init.body_bytes, self.init.total_bytes)
        packet_bytes = body_bytes + CHUNK_OVERHEAD_BYTES + LIMITS.packet_overhead_bytes
        return packet_bytes > link.packet_bytes_max

    def need(self, need: Need) -> None:
        """The server says what it lacks. Raises PeerError for a bitmap of another length."""
        self._missing = deque(missing_in(need.bitmap, self.init.layout.count))

    def hold(self) -> None:
        """Not now: the server will say again what it lacks."""
        self._missing.clear()

    def next(self, link: LinkUp, publishes: int) -> tuple[int, ...]:
        """The chunks to send now, when the link takes `publishes` more without queueing."""
        window = min(publishes, len(self._missing), self._window(link, publishes))
        return tuple(self._missing.popleft() for _ in range(window))

    def _window(self, link: LinkUp, publishes: int) -> int:
        """What the server's window leaves, given what is on its way to the broker."""
        if self._go is None:
            return publishes
        on_its_way = max(0, link.inflight_max - publishes)
        return self._go.window - on_its_way
