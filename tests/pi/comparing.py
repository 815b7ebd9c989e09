"""The same steps of the same task in two device runtimes: how far apart do they end?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Plan, Task
from broker_bridge.wire.weights import Tensors
from server.tasks.checks import Result, random_steps, read_result, write_job
from tests.pi.machine import Machine

__all__ = ["Job", "differences", "job", "train"]


@dataclass(frozen=True)
class Job:
    """A task, the weights it starts from, and the steps to train."""

    plan: Plan
    start: Tensors
    steps: tuple[Samples, ...]


def job(plan: Plan, start: Tensors, *, steps: int) -> Job:
    """Steps of random samples; the last one is short."""
    return Job(plan, start, tuple(random_steps(plan.task, steps)))


def train(machine: Machine, jobs: Mapping[str, Job], folder: Path) -> dict[str, Result]:
    """Train every job on `machine`, in one process, and return what came out by name."""
    folders = {name: folder / f"{place}" for place, name in enumerate(jobs)}
    for name, each in jobs.items():
        folders[name].mkdir(parents=True)
        write_job(folders[name], each.plan, each.start, each.steps, each.plan.task.defaults)
    done = machine.run("-m", "tests.pi.steps", machine.runtime, *map(str, folders.values()))
    assert done.returncode == 0, f"{machine.name}: exit {done.returncode}: {done.stderr[-2000:]}"
    return {name: read_result(each) for name, each in folders.items()}


def differences(task: Task, start: Tensors, one: Result, other: Result) -> dict[str, float]:
    """Return for each tensor max |one - other|, relative to what training changed.

    The measure of the self-check (`server/tasks/selfcheck.py`): a tensor's own change, a hundredth
    of its values, a tenth of the largest change anywhere. Losses and outputs: their values.
    """
    found = {}
    moved = [np.abs(one.arrays[f"w{i}"] - start[s.name]).max() for i, s in enumerate(task.weights)]
    for i, spec in enumerate(task.weights):
        value, wanted = other.arrays[f"w{i}"], one.arrays[f"w{i}"]
        scale = max(moved[i], 0.1 * max(moved), 0.01 * np.abs(wanted).max(), 1e-8)
        found[spec.name] = float(np.abs(value - wanted).max() / scale)
    for name in set(one.arrays) - {f"w{i}" for i in range(len(task.weights))}:
        value, wanted = other.arrays[name], one.arrays[name]
        gap = np.abs(value - wanted).max() / max(1.0, np.abs(wanted).max())
        found[name] = float(gap)
    return {name: gap if np.isfinite(gap) else float("inf") for name, gap in found.items()}
