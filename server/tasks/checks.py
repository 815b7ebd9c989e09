"""Run a plan in the device runtimes installed here, each in a process of its own.

No TensorFlow in this file: it is used by `inspect` as well as by the self-check.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Plan, Task, Training, encode_plan
from broker_bridge.wire import weights as wire
from broker_bridge.wire.weights import Tensors, TensorSpec

__all__ = [
    "Result",
    "arrays_of",
    "installed_runtimes",
    "random_steps",
    "read_result",
    "run_on_device",
    "write_job",
]

Array = NDArray[Any]

_MODULES = {"tflite-runtime": "tflite_runtime", "ai-edge-litert": "ai_edge_litert"}


@dataclass(frozen=True)
class Result:
    """What a device made of the steps: arrays as in the worker's result.npz, and measurements."""

    arrays: dict[str, Array]
    runtime: str
    load_ms: float
    step_ms: tuple[float, ...]
    peak_mb: float


def installed_runtimes() -> list[str]:
    """Return the device runtimes that can be imported here; LocalError if there is none."""
    found = [name for name, module in _MODULES.items() if importlib.util.find_spec(module)]
    if not found:
        raise LocalError(
            "no device runtime is installed to check the task with: pip install 'midge[device]'"
        )
    return found


def run_on_device(
    plan: Plan,
    weights: Tensors,
    steps: Sequence[Samples],
    settings: Training,
    *,
    runtime: str,
    repeat: int = 0,
) -> Result:
    """Train `steps` from `weights`. Raises LocalError when the runtime cannot."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(folder, plan, weights, steps, settings)
        command = [sys.executable, "-m", "server.tasks.worker", name, runtime, str(repeat)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            raise LocalError(f"the task does not run on {runtime}: {reason}")
        return read_result(folder)


def write_job(
    folder: Path, plan: Plan, weights: Tensors, steps: Sequence[Samples], settings: Training
) -> None:
    """Leave in `folder` what the worker reads."""
    (folder / "plan").write_bytes(encode_plan(plan.task, plan.tflite))
    (folder / "weights").write_bytes(wire.encode(weights))
    (folder / "settings.json").write_bytes(msgspec.json.encode(settings))
    np.savez(folder / "steps.npz", **arrays_of(steps))


def read_result(folder: Path) -> Result:
    """Return what the worker left in `folder`."""
    facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with np.load(folder / "result.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return Result(
        arrays, facts["runtime"], facts["load_ms"], tuple(facts["step_ms"]), facts["peak_mb"]
    )


def random_steps(task: Task, count: int, *, seed: int = 0) -> list[Samples]:
    """Return `count` batches of random samples that fit `task`; the last one is short."""
    draw = np.random.default_rng(seed)
    steps = []
    for number in range(count):
        last = number == count - 1 and task.batch_size > 1
        rows = max(1, task.batch_size * 2 // 3) if last else task.batch_size
        ranges = task.input_ranges or (None,) * len(task.inputs)
        inputs = tuple(
            _random(draw, rows, spec, within)
            for spec, within in zip(task.inputs, ranges, strict=True)
        )
        labels = _random_labels(draw, rows, task)
        weight = draw.uniform(0.5, 1.5, rows).astype(np.float32)
        steps.append(Samples(inputs, labels, weight))
    return steps


def arrays_of(steps: Sequence[Samples]) -> dict[str, Array]:
    """Return `steps` as the worker reads them from steps.npz."""
    arrays: dict[str, Array] = {}
    for number, step in enumerate(steps):
        arrays |= {f"{number}_x{i}": array for i, array in enumerate(step.inputs)}
        arrays[f"{number}_y"] = step.labels
        weight = np.ones(len(step), np.float32) if step.weights is None else step.weights
        arrays[f"{number}_sample_weight"] = weight
    return arrays


def _random(
    draw: np.random.Generator, rows: int, spec: TensorSpec, within: tuple[float, float] | None
) -> Array:
    shape = (rows, *spec.shape)
    if within is not None:
        return draw.integers(int(within[0]), int(within[1]) + 1, shape).astype(spec.dtype)
    if spec.dtype == "float32":
        return draw.normal(size=shape).astype(np.float32)
    return draw.integers(0, 2, shape).astype(spec.dtype)


def _random_labels(draw: np.random.Generator, rows: int, task: Task) -> Array:
    shape = (rows, *task.label.shape)
    if task.label.dtype == "float32":
        shares = draw.uniform(0.05, 1.0, shape)
        if len(shape) > 1 and shape[-1] > 1:
            shares = shares / shares.sum(-1, keepdims=True)
        return shares.astype(np.float32)
    low, high = task.label_range or (0, 1)
    return draw.integers(int(low), int(high) + 1, shape).astype(task.label.dtype)
