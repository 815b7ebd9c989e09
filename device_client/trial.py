"""Train a task on this device alone, without a server: to see what it does, and what it costs.

The same path as in a round: the same data source, runtime and trainer, from the task's
initial weights. Nothing is sent.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import Training, decode_task
from device_client.data import load_samples
from device_client.trainer import Progress, Trainer

__all__ = ["Trial", "run_trial"]


@dataclass(frozen=True)
class Trial:
    """What came of it. `curve`: the mean training loss of each epoch."""

    task: str
    runtime: str
    samples: int
    parameters: int
    epochs: int
    seconds: float
    step_ms: float
    curve: list[float]
    train: dict[str, float]
    test: dict[str, float]
    test_samples: int

    def facts(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return self.__dict__ | {}


def run_trial(
    path: Path,
    data: str,
    *,
    test: str | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    seed: int = 1,
    threads: int = 1,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> Trial:
    """Train the task file at `path` on `data`, measure it on `test`. Raises LocalError."""
    with disk_errors(path):
        content = path.read_bytes()
    try:
        plan, weights = decode_task(content)
    except PeerError as error:
        raise LocalError(f"{path}: {error}") from None
    task = plan.task
    settings = Training(
        epochs=epochs or task.defaults.epochs,
        learning_rate=learning_rate or task.defaults.learning_rate,
        clip_norm=task.defaults.clip_norm,
    )
    runtime = TaskRuntime(plan, num_threads=threads)
    samples = load_samples(data, task)
    trainer = Trainer(runtime, samples)
    losses: list[float] = []

    def step_done(progress: Progress) -> bool:
        losses.append(progress.loss)
        on_step(progress)
        return True

    started = time.monotonic()
    trained = trainer.train(weights, settings, seed=seed, on_step=step_done)
    seconds = time.monotonic() - started
    if trained is None:
        raise LocalError("the trial was stopped")
    measured = None if test is None else runtime.evaluate(trained.weights, load_samples(test, task))
    return Trial(
        task=task.name,
        runtime=runtime.runtime_name,
        samples=len(samples),
        parameters=task.parameters,
        epochs=settings.epochs,
        seconds=seconds,
        step_ms=1000 * seconds / trained.steps,
        curve=_by_epoch(losses, settings.epochs),
        train={"loss": trained.loss} | trained.metrics,
        test={} if measured is None else {"loss": measured.loss} | measured.metrics,
        test_samples=0 if measured is None else measured.examples,
    )


def _by_epoch(losses: list[float], epochs: int) -> list[float]:
    steps = len(losses) // epochs
    return [statistics.fmean(losses[e * steps : (e + 1) * steps]) for e in range(epochs)]
