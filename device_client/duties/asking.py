"""When to ask again what got no answer, and when to ask no more."""

from dataclasses import dataclass

from device_client.duties.standing import Standing

__all__ = ["SILENCE_S", "TRIES_MAX", "Asking"]

# How long to wait before asking again, and how often (AWS IoT's streams use the same).
SILENCE_S = 10.0
TRIES_MAX = 32
_AGAIN_S = 1.0  # the shortest time between two questions that nobody answered


@dataclass
class Asking:
    """One question that may have to be asked again."""

    here: Standing
    _at_s: float = 0.0  # when to act next if nothing is heard
    _asked_s: float = 0.0
    _tries: int = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time."""
        return self.here.now_s >= self._at_s

    @property
    def in_vain(self) -> bool:
        """Whether it was asked as often as it may be."""
        return self._tries >= TRIES_MAX

    def asked(self) -> None:
        """It goes out now."""
        self._tries += 1
        self._asked_s = self.here.now_s
        self._at_s = self.here.now_s + SILENCE_S * (0.75 + 0.5 * self.here.draw())

    def heard(self) -> None:
        """The other side is there: wait for it as if nothing was asked yet."""
        self.wait(SILENCE_S)
        self.anew()

    def anew(self) -> None:
        """What was asked before does not count."""
        self._tries = 0

    def wait(self, seconds: float) -> None:
        """It is time in so many seconds."""
        self._at_s = self.here.now_s + seconds

    def soon(self, spread_s: float) -> None:
        """Whoever was to answer came back. Many hear that at once: ask within `spread_s`."""
        soon_s = max(self.here.now_s, self._asked_s + _AGAIN_S)
        self._at_s = min(self._at_s, soon_s + self.here.draw() * spread_s)
