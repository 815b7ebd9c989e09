"""What happens to whom: one seed, one story."""

import hashlib
from dataclasses import dataclass

from device_client.participant import State

__all__ = ["Fate"]

_MOMENTS = (State.JOINING, State.FETCHING, State.TRAINING, State.UPLOADING)


@dataclass(frozen=True)
class Fate:
    """Draws what happens to a device in a round. One seed, one story."""

    seed: int = 0
    drop: float = 0.0  # the share that loses power once in each round it takes part in
    slow: float = 0.0  # the share that trains for `slow_s`
    train_s: float = 0.5
    slow_s: float = 20.0
    away_s: float = 10.0

    def draw(self, device: str, round_: int, what: str) -> float:
        """A number in [0, 1)."""
        text = f"{self.seed} {device} {round_} {what}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / (1 << 48)

    def cut_at(self, device: str, round_: int) -> State | None:
        """In which state the power goes, if it does."""
        if self.draw(device, round_, "drop") >= self.drop:
            return None
        return _MOMENTS[int(self.draw(device, round_, "moment") * len(_MOMENTS))]

    def train_for_s(self, device: str, round_: int) -> float:
        """How long training takes."""
        if self.draw(device, 0, "slow") < self.slow:
            return self.slow_s
        return self.train_s * (0.5 + self.draw(device, round_, "train"))
