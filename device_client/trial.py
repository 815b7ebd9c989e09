"""Train a task on this device alone, without a server: to see what it does, and what it costs.

The same path as in a round: the same data source, runtime, trainer and locked process, from
the task's initial weights. Nothing is sent.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.runtime import Evaluation
from broker_bridge.task.taskfile import Plan, Training, decode_task
from broker_bridge.wire.weights import Tensors
from device_client.sandbox.trainer import Sandbox, SandboxSettings
from device_client.trainer import Progress

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
    plan, weights = _task_in(path)
    task = plan.task
    settings = Training(
        epochs=epochs or task.defaults.epochs,
        learning_rate=learning_rate or task.defaults.learning_rate,
        clip_norm=task.defaults.clip_norm,
    )
    losses: list[float] = []

    def step_done(progress: Progress) -> bool:
        losses.append(progress.loss)
        on_step(progress)
        return True

    with contextlib.closing(Sandbox(SandboxSettings(data, threads=threads))) as sandbox:
        trainer = sandbox.load(plan)
        started = time.monotonic()
        trained = trainer.train(weights, settings, seed=seed, on_step=step_done)
        seconds = time.monotonic() - started
    if trained is None:
        raise LocalError("the trial was stopped")
    measured = None if test is None else _measured(plan, trained.weights, test, threads)
    return Trial(
        task=task.name,
        runtime=trained.runtime,
        samples=trained.examples,
        parameters=task.parameters,
        epochs=settings.epochs,
        seconds=seconds,
        step_ms=1000 * seconds / trained.steps,
        curve=_by_epoch(losses, settings.epochs),
        train={"loss": trained.loss} | trained.metrics,
        test={} if measured is None else {"loss": measured.loss} | measured.metrics,
        test_samples=0 if measured is None else measured.examples,
    )


def _task_in(path: Path) -> tuple[Plan, Tensors]:
    with disk_errors(path):
        content = path.read_bytes()
    try:
        return decode_task(content)
    except PeerError as error:
        raise LocalError(f"{path}: {error}") from None


def _measured(plan: Plan, weights: Mapping[str, Any], test: str, threads: int) -> Evaluation:
    """Of other samples, in a process that never saw the first."""
    with contextlib.closing(Sandbox(SandboxSettings(test, threads=threads))) as sandbox:
        return sandbox.load(plan).evaluate(weights)


def _by_epoch(losses: list[float], epochs: int) -> list[float]:
    steps = len(losses) // epochs
    return [statistics.fmean(losses[e * steps : (e + 1) * steps]) for e in range(epochs)]
