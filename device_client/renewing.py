"""When to ask for what is newer: the rules, and nothing but the rules. Part of the participant.

Asked once, and again after 10 s, 20 s, … up to 10 minutes, for as long as there is no answer:
a device that gave up would never come back. A refusal is asked about again an hour later.
"""

from collections.abc import Callable
from dataclasses import dataclass

from device_client.events import Renew

__all__ = ["Renewing"]

SPREAD_S = 2.0  # at the least: a fleet that hears of a new key must not ask in one moment
_AGAIN_S = 10.0
_AGAIN_MAX_S = 600.0
_REFUSED_S = 3600.0


@dataclass
class Renewing:
    """Whether there is something to ask for, and when."""

    draw: Callable[[], float]  # uniform in [0, 1)
    wanted: bool = False
    keys: bool = False
    _at_s: float = 0.0
    _tries: int = 0

    def want(
        self, now_s: float, *, keys: bool = False, spread_s: float = 0.0, anew: bool = False
    ) -> None:
        """There is something newer. If that is no news, asking goes on as it did; unless `anew`."""
        if anew or not self.wanted:
            self._at_s, self._tries = now_s + self.draw() * spread_s, 0
        self.wanted, self.keys = True, self.keys or keys

    def done(self, *, keys: bool) -> None:
        """It came. Wanted `keys` that did not come with it are wanted on."""
        self.keys = self.keys and not keys
        self.wanted = self.keys

    def refused(self, now_s: float) -> None:
        """Not now: ask again much later, or when there is a new reason."""
        if self.wanted:
            self._at_s = now_s + _REFUSED_S * (0.75 + 0.5 * self.draw())

    def connected(self, now_s: float) -> None:
        """The broker is there again: what was asked for may be lost, and so may be the answer."""
        if self.wanted:
            self._at_s, self._tries = min(self._at_s, now_s + self.draw() * SPREAD_S), 0

    def due(self, now_s: float, *, at_rest: bool) -> list[Renew]:
        """What to ask now. New keys are offered by a device `at_rest` only."""
        if not self.wanted or now_s < self._at_s:
            return []
        again_s = min(_AGAIN_S * 2**self._tries, _AGAIN_MAX_S)
        self._at_s = now_s + again_s * (0.75 + 0.5 * self.draw())
        self._tries = min(self._tries + 1, 16)
        return [Renew(self.keys and at_rest, self._tries)]
