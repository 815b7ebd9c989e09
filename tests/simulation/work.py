"""What a simulated federation trains, and with what: a task without a model, training by dice.

Every training draws its own update, as threads and chips do: the same device training the
same round twice sends two different ones. `Trainings` remembers each, for the oracle.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import Evaluation
from broker_bridge.task.taskfile import Task, Training, encode_task
from broker_bridge.wire import weights
from broker_bridge.wire.weights import TensorSpec
from device_client import events as ev
from device_client.background import Work
from device_client.trainer import Progress, Trained

__all__ = ["LaterBackground", "SimulatedTrainer", "Trainings", "task_file"]

SPECS = (
    TensorSpec("dense/kernel", "float32", (20, 15)),
    TensorSpec("dense/bias", "float32", (90,)),
)
TFLITE = b"no model: the simulated trainer needs none"


def task_file() -> bytes:
    """A `.task` file of two tensors, 1.6 kB: three chunks."""
    draw = np.random.default_rng(7)
    initial = weights.encode(
        {spec.name: draw.normal(size=spec.shape).astype(np.float32) for spec in SPECS}
    )
    task = Task(
        name="dice", batch_size=1, evaluation_batch_size=1,
        inputs=(TensorSpec("x", "float32", (1,)),), label=TensorSpec("y", "int32", ()),
        output=TensorSpec("p", "float32", (2,)), weights=SPECS, trainable_count=len(SPECS),
        optimiser="sgd", loss="none",
        tflite_digest=hashlib.sha256(TFLITE).hexdigest(), tflite_bytes=len(TFLITE),
        weights_digest=hashlib.sha256(initial).hexdigest(), weights_bytes=len(initial),
    )  # fmt: skip
    return encode_task(task, TFLITE, initial)


@dataclass
class Trainings:
    """Every training that ever ended: whose, and the weights it led to."""

    done: list[tuple[str, dict[str, NDArray[np.float32]]]] = field(default_factory=list)


class SimulatedTrainer:
    """A LocalTrainer whose result is drawn."""

    def __init__(
        self, device: str, trainings: Trainings, *, fails: Callable[[], bool] = lambda: False
    ) -> None:
        self._fails = fails
        self._device = device
        self._trainings = trainings

    def __len__(self) -> int:
        return 10

    def train(
        self,
        weights: Mapping[str, NDArray[Any]],
        settings: Training,
        *,
        seed: int,
        on_step: Callable[[Progress], bool],
        optimiser_state: Mapping[str, NDArray[Any]] | None = None,
    ) -> Trained | None:
        number = len(self._trainings.done)
        draw = np.random.Generator(np.random.PCG64([seed, number]))
        if self._fails():
            raise LocalError("the samples cannot be read; check the sensor")
        if not on_step(Progress(1, 1, 0.5)):
            return None
        new = {
            name: (array + draw.normal(0, 0.1, array.shape)).astype(np.float32)
            for name, array in weights.items()
        }
        self._trainings.done.append((self._device, new))
        return Trained(
            weights=new, examples=1 + int(draw.integers(1000)), steps=1, loss=0.5,
            metrics={"training": float(number)}, seconds=1.0,
        )  # fmt: skip

    def evaluate(self, weights: Mapping[str, NDArray[Any]]) -> Evaluation:
        return Evaluation(10, 0.5, {})


class LaterBackground:
    """Runs the work when its time has come, on a virtual clock."""

    def __init__(self, clock: Callable[[], float], duration_s: Callable[[], float]) -> None:
        self._clock = clock
        self._duration_s = duration_s
        self._work: Work | None = None
        self._due_s = 0.0
        self.stopping = False

    def start(self, work: Work) -> None:
        self._work, self._due_s = work, self._clock() + self._duration_s()

    def stop(self) -> bool:
        had, self._work = self._work is not None, None
        return had

    def finished(self) -> list[ev.Event]:
        if self._work is None or self._clock() < self._due_s:
            return []
        work, self._work = self._work, None
        return work()
