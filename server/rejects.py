"""What was dropped, counted by reason, and now and then written down. No promise depends on it."""

import logging
from collections import Counter
from collections.abc import Callable

from broker_bridge.errors import LocalError, PeerError
from server.ledger import Ledger

__all__ = ["Rejects"]

log = logging.getLogger("midge.server")

_KINDS_MAX = 200
_KEEP_S = 60.0  # how often the counts are written down


class Rejects:
    """Counts in `counts`, which others read and count in, too."""

    def __init__(self, counts: Counter[str], ledger: Ledger, *, clock: Callable[[], float]) -> None:
        self._counts = counts
        self._ledger = ledger
        self._clock = clock
        self._kept: Counter[str] = Counter()  # what is written down of them
        self._keep_at_s = clock() + _KEEP_S

    def restore(self) -> None:
        """Go on from what was written down."""
        with self._ledger.db.reading() as tx:
            self._kept = Counter(tx.rejects())
        self._counts.update(self._kept)

    def count(self, error: PeerError, topic: str) -> None:
        """One more. Whoever sends nonsense for hours must not fill the disk with lines about it:
        each reason is told the 1st, 2nd, 4th, 8th … time."""
        reason = error.reason if len(self._counts) < _KINDS_MAX else "other"
        self._counts[reason] += 1
        count = self._counts[reason]
        level = logging.INFO if count & (count - 1) == 0 else logging.DEBUG
        log.log(level, "dropped a message on %s: %s (%s: %d so far)", topic, error, reason, count)

    def keep_now_and_then(self) -> None:
        """Write down what was dropped since the last time, if it is time."""
        if self._clock() >= self._keep_at_s:
            self.keep()

    def keep(self) -> None:
        """Write down what was dropped since the last time."""
        self._keep_at_s = self._clock() + _KEEP_S
        more = self._counts - self._kept
        if not more:
            return
        try:
            self._ledger.count_rejects(more)
        except LocalError as error:
            log.warning("what was dropped is not written down: %s", error)
            return
        self._kept = Counter(self._counts)
