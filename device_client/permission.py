"""Whether the owner's rules let this device work now: looked at every second, told when it is new.

The rules are in `eligibility.py`, what they are judged by in `readings.py`.
"""

import logging
from collections.abc import Callable

from device_client.eligibility import Verdict, reason_against
from device_client.events import Eligible

__all__ = ["Permission"]

log = logging.getLogger("midge.device")

_JUDGE_S = 1.0


class Permission:
    """What the rules said when last looked at."""

    def __init__(
        self, judge: Callable[[int | None], list[Verdict]] | None, clock: Callable[[], float]
    ) -> None:
        """`judge` says what the rules say now, given the number of samples; None: no rules."""
        self.present = Eligible()
        self._judge = judge
        self._clock = clock
        self._at_s = 0.0

    def look(self, samples: int | None) -> Eligible | None:
        """What the rules say now, if it is time to look and they say something else."""
        if self._judge is None or self._clock() < self._at_s:
            return None
        self._at_s = self._clock() + _JUDGE_S
        verdicts = self._judge(samples)
        before, self.present = (
            self.present,
            Eligible(reason_against(verdicts), reason_against([v for v in verdicts if v.network])),
        )
        if self.present == before:
            return None
        against = self.present.against
        if bool(against) != bool(before.against):
            log.info("%s", f"not now: {against}" if against else "may work again")
        return self.present
