"""Training that costs nothing: seeded noise, after as long as it is said to take."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_bridge.task.runtime import Evaluation
from broker_bridge.task.samples import Part
from broker_bridge.task.taskfile import Training
from device_client import events as ev
from device_client.background import Work
from device_client.trainer import Progress, Trained

__all__ = ["FastTrainer", "PacedBackground"]

Array = NDArray[Any]
_NOISE_VALUES = 1 << 16


class FastTrainer:
    """Training that costs nothing: the update is noise, the same for the same seed."""

    _noise = np.random.default_rng(7).normal(0, 1e-3, 2 * _NOISE_VALUES).astype(np.float32)

    def __init__(self, examples: int) -> None:
        self._examples = examples

    def __len__(self) -> int:
        """How many samples it claims."""
        return self._examples

    def train(
        self,
        weights: Mapping[str, Array],
        settings: Training,
        *,
        seed: int,
        on_step: Callable[[Progress], bool],
        optimiser_state: Mapping[str, Array] | None = None,  # noqa: ARG002 - noise has none
        part: Part = "all",  # noqa: ARG002 - nor samples
    ) -> Trained | None:
        """The weights and some noise."""
        start = seed % _NOISE_VALUES
        noise = self._noise[start : start + _NOISE_VALUES]
        new = {
            name: array + np.resize(noise, array.shape) if array.dtype == np.float32 else array
            for name, array in weights.items()
        }
        loss = 1.0 + start / _NOISE_VALUES
        if not on_step(Progress(1, 1, loss)):
            return None
        return Trained(new, self._examples, settings.epochs, loss, {}, 0.0)

    def evaluate(
        self,
        weights: Mapping[str, Array],
        *,
        part: Part = "all",  # noqa: ARG002
    ) -> Evaluation:
        """A made-up loss."""
        return Evaluation(self._examples, 1.0 + 0.0 * len(weights), {})


class PacedBackground:
    """Work that is done at once, when its time has come."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work: Work | None = None
        self.takes_s = 0.0
        self.due_s = 0.0

    def start(self, work: Work) -> None:
        """Do `work` in `takes_s`."""
        self._work, self.due_s = work, self._clock() + self.takes_s

    def stop(self) -> bool:
        """Forget the work."""
        stopped, self._work = self._work is not None, None
        return stopped

    @property
    def stopping(self) -> bool:
        """Never: what was begun is done."""
        return False

    @property
    def waits(self) -> bool:
        """Whether there is work to do at `due_s`."""
        return self._work is not None

    def finished(self) -> list[ev.Event]:
        """Do the work, if it is time."""
        if self._work is None or self._clock() < self.due_s:
            return []
        work, self._work = self._work, None
        return work()
