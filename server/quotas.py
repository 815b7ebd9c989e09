"""How much of the server one device may take up: rules, with the time passed in.

A device that is broken or hostile may say anything, at any speed. What it says beyond its
share is refused here, before a signature is checked or the database is asked, so it costs
the server about what reading the topic costs. Nothing here says who is right, only how
much; and it keeps a bounded amount about whoever asks.
"""

from collections import OrderedDict
from dataclasses import dataclass

from broker_bridge.errors import PeerError

__all__ = ["Quotas", "Shares"]

_NAMES_MAX = 65_536  # names of which something is remembered, the latest ones
_CHUNKS_ROOM_BYTES = 4096  # beside the content: what cutting a small update into chunks adds


@dataclass(frozen=True)
class Shares:
    """What one device may do."""

    control_per_minute: float = 120.0  # messages that are no chunk; so many may come at once
    control_per_round: float = 8.0  # beside these: short rounds may follow one another quickly
    repeats_max: int = 8  # chunks of a round: so many times the bytes of an update


@dataclass
class _Bucket:
    """A token bucket (RFC 2697, section 3, without colours)."""

    tokens: float
    at_s: float
    rounds: int  # that had begun by then


class Quotas:
    """What each device took of its share."""

    def __init__(self, shares: Shares | None = None) -> None:
        self.shares = shares or Shares()
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._rounds = 0
        self._round_bytes_max = 0

    def begin_round(self, update_bytes: int) -> None:
        """A round is open whose updates are so long: every device has what one round takes."""
        self._rounds += 1
        update = update_bytes + update_bytes // 8 + _CHUNKS_ROOM_BYTES
        self._round_bytes_max = self.shares.repeats_max * update
        self._bytes.clear()

    def control(self, device: str, *, now_s: float) -> None:
        """Count a message that is no chunk. Raises PeerError `too_fast`."""
        most, per_s = self.shares.control_per_minute, self.shares.control_per_minute / 60
        bucket = self._buckets.pop(device, None) or _Bucket(most, now_s, self._rounds)
        earned = max(0.0, now_s - bucket.at_s) * per_s
        earned += (self._rounds - bucket.rounds) * self.shares.control_per_round
        bucket.tokens = min(most, bucket.tokens + earned)
        bucket.at_s, bucket.rounds = max(bucket.at_s, now_s), self._rounds
        self._buckets[device] = bucket
        if len(self._buckets) > _NAMES_MAX:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            raise PeerError("too_fast", f"{device} sends more than {most:g} messages a minute")
        bucket.tokens -= 1

    def chunk(self, device: str, size_bytes: int) -> None:
        """Count a chunk of an update. Raises PeerError `too_much`.

        Outside a round there is no share to keep to: nothing is taken then anyway.
        """
        taken = self._bytes.get(device, 0) + size_bytes
        if taken > self._round_bytes_max > 0:
            raise PeerError("too_much", f"{device} sent its update too many times over")
        if len(self._bytes) < _NAMES_MAX or device in self._bytes:
            self._bytes[device] = taken
