"""Local training: epochs, shuffling, short batches, progress, and a way to stop between steps.

One seed gives one result on one kind of machine. Samples stay in this object and go
to the runtime only. What leaves is weights, counts and averages.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.machine import peak_memory_bytes
from broker_bridge.task.runtime import Evaluation, State, Step, TaskRuntime
from broker_bridge.task.samples import Part, Samples, check_samples, part_of
from broker_bridge.task.taskfile import Training

__all__ = [
    "Apart",
    "LocalTrainer",
    "NotLoadedError",
    "Progress",
    "Trained",
    "Trainer",
    "TrainingDivergedError",
]

Array = NDArray[Any]


class TrainingDivergedError(LocalError):
    """The loss is no longer a number; nothing of this round may be sent."""


class NotLoadedError(LocalError):
    """Loading was given up because the device is stopping: nothing is wrong with task or data."""


@dataclass(frozen=True)
class Progress:
    """How far training is: step `step` of `steps` is done, with this loss."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Trained:
    """The result of a round. `loss` and `metrics` are means over the last epoch.

    `runtime` and `peak_bytes` (of memory, so far) are those of the process that trained.
    """

    weights: dict[str, Array]
    examples: int
    steps: int
    loss: float
    metrics: dict[str, float]
    seconds: float
    optimiser_state: dict[str, Array] = field(default_factory=dict)
    runtime: str = ""
    peak_bytes: int = 0  # 0: not known


class LocalTrainer(Protocol):
    """What a task trains with on a device: `Trainer`, or one in a locked process."""

    def __len__(self) -> int:
        """How many samples there are."""

    def train(
        self,
        weights: Mapping[str, Array],
        settings: Training,
        *,
        seed: int,
        on_step: Callable[[Progress], bool],
        optimiser_state: Mapping[str, Array] | None = None,
        part: Part = "all",
    ) -> Trained | None:
        """Train from `weights` on this part of the samples; None when `on_step` answered False.

        `optimiser_state`: that of the training before, for a task that keeps it.
        """

    def evaluate(self, weights: Mapping[str, Array], *, part: Part = "all") -> Evaluation:
        """Measure `weights` on this part of the samples."""


@runtime_checkable
class Apart(Protocol):
    """What a LocalTrainer can do beside that works in a process of its own."""

    def warm(self) -> None:
        """Have that process begin to get ready. Raises LocalError."""

    def interrupt(self) -> None:
        """Have the present work end soon, also where the process hangs."""


class Trainer:
    """Trains on `samples`, again and again, from whatever weights it is given."""

    def __init__(
        self,
        runtime: TaskRuntime,
        samples: Samples,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises LocalError when `samples` do not fit the runtime's task."""
        self._runtime = runtime
        self._samples = check_samples(runtime.task, samples)
        self._clock = clock

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._samples)

    def train(
        self,
        weights: Mapping[str, Array],
        settings: Training,
        *,
        seed: int,
        on_step: Callable[[Progress], bool] = lambda _: True,
        optimiser_state: Mapping[str, Array] | None = None,
        part: Part = "all",
    ) -> Trained | None:
        """Train `settings.epochs` epochs from `weights`; None when `on_step` answered False.

        `on_step` runs after each step and may take its time: that is how training pauses.
        `optimiser_state` is that of an earlier `Trained`, used if the task keeps it.
        Raises TrainingDivergedError, and PeerError when the weights are not the task's.
        """
        if part != "all":
            return self._on(part).train(weights, settings, seed=seed, on_step=on_step)
        started = self._clock()
        state = self._start(weights, optimiser_state)
        anchor = state.weights
        batch_size = self._runtime.task.batch_size
        steps = settings.epochs * math.ceil(len(self._samples) / batch_size)
        epoch = _Epoch(len(self._runtime.task.metrics))
        batches = _batches(len(self._samples), batch_size, settings.epochs, seed)
        for number, (first, rows) in enumerate(batches, start=1):
            epoch = _Epoch(len(self._runtime.task.metrics)) if first else epoch
            step = self._step(state, rows, settings, anchor, seed=_mix(seed, number))
            if not math.isfinite(step.loss):
                raise _diverged(f"the loss became {step.loss} at step {number} of {steps}")
            state = step.state
            epoch.add(step, len(rows))
            if not on_step(Progress(number, steps, step.loss)):
                return None
        return self._trained(state, epoch, steps, self._clock() - started)

    def evaluate(
        self,
        weights: Mapping[str, Array],
        on_batch: Callable[[], None] = lambda: None,
        *,
        part: Part = "all",
    ) -> Evaluation:
        """Return how `weights` do on this trainer's own samples."""
        return self._runtime.evaluate(weights, part_of(self._samples, part), on_batch)

    def _on(self, part: Part) -> "Trainer":
        """The same on a part of the samples."""
        return Trainer(self._runtime, part_of(self._samples, part), clock=self._clock)

    def _start(
        self, weights: Mapping[str, Array], optimiser_state: Mapping[str, Array] | None
    ) -> State:
        task = self._runtime.task
        state = self._runtime.fresh_state(weights)
        if not task.keep_optimiser_state or not optimiser_state:
            return state
        kept = [optimiser_state.get(slot.tensor.name) for slot in task.optimiser_state]
        fits = all(
            array is not None and array.shape == slot.tensor.shape and np.isfinite(array).all()
            for array, slot in zip(kept, task.optimiser_state, strict=True)
        )
        # State of another task, or a broken one, is worth less than a fresh start.
        slots = tuple(np.asarray(array, np.float32) for array in kept) if fits else state.slots
        return State(state.weights, slots)

    def _step(
        self,
        state: State,
        rows: NDArray[np.int64],
        settings: Training,
        anchor: Sequence[NDArray[np.float32]],
        *,
        seed: int,
    ) -> Step:
        samples = self._samples
        weight = None if samples.weights is None else samples.weights[rows]
        inputs = [array[rows] for array in samples.inputs]
        return self._runtime.train_step(
            state, inputs, samples.labels[rows], weight, settings, anchor, seed
        )

    def _trained(self, state: State, epoch: "_Epoch", steps: int, seconds: float) -> Trained:
        task = self._runtime.task
        # The loss does not tell all: ReLU kernels turn NaN into 0.
        for spec, array in zip(task.weights, state.weights, strict=True):
            if not np.isfinite(array).all():
                raise _diverged(f"the weight {spec.name} is no longer a finite number")
        return Trained(
            weights={s.name: a for s, a in zip(task.weights, state.weights, strict=True)},
            examples=len(self._samples),
            steps=steps,
            loss=epoch.loss / epoch.rows,
            metrics=dict(zip(task.metrics, epoch.means(), strict=True)),
            seconds=seconds,
            optimiser_state={
                slot.tensor.name: array
                for slot, array in zip(task.optimiser_state, state.slots, strict=True)
            },
            runtime=self._runtime.runtime_name,
            peak_bytes=peak_memory_bytes(),
        )


class _Epoch:
    """Running sums of one epoch. Steps themselves are not kept: each holds all weights."""

    def __init__(self, metrics: int) -> None:
        self.loss = 0.0
        self.rows = 0
        self._sums = np.zeros(1 + metrics)
        self._counts = np.zeros(1 + metrics)

    def add(self, step: Step, rows: int) -> None:
        """Count `step`, which had `rows` rows."""
        self.loss += step.loss * rows
        self.rows += rows
        self._sums += step.sums
        self._counts += step.counts

    def means(self) -> list[float]:
        """Return each metric's weighted mean."""
        pairs = zip(self._sums[1:], self._counts[1:], strict=True)
        return [float(total / count) if count > 0 else 0.0 for total, count in pairs]


def _batches(
    samples: int, batch_size: int, epochs: int, seed: int
) -> Iterator[tuple[bool, NDArray[np.int64]]]:
    """Yield (first of its epoch, rows) for every step; each epoch has its own order."""
    draw = np.random.Generator(np.random.PCG64(seed))
    for _ in range(epochs):
        order = draw.permutation(samples)
        for start in range(0, samples, batch_size):
            yield start == 0, order[start : start + batch_size]


def _diverged(what: str) -> TrainingDivergedError:
    return TrainingDivergedError(f"{what}: lower the learning rate, or set clip_norm")


def _mix(seed: int, step: int) -> int:
    """Return a seed for one step that no other step of this or a nearby seed has."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
