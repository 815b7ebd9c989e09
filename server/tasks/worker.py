"""Run a plan in a device runtime, in a process of its own: `python -m server.tasks.worker`.

TensorFlow and the device runtimes do not share a process well, and a device has no
TensorFlow: so checks and measurements happen here. Reads and writes one folder:

    plan, weights       the task, and the weights to start from
    steps.npz           for step i: i_x0…, i_y, i_sample_weight; a step may be short
    settings.json       training settings
    result.npz          what came out: w0…, o0…, losses, sums, counts, output
    result.json         runtime, milliseconds for each step, peak memory in MB

Only NumPy and the runtime are imported, so that the memory printed is a device's.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from broker_bridge.machine import peak_memory_bytes
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Training, decode_plan
from broker_bridge.wire import weights as wire

__all__ = ["main", "read_steps", "train"]


def read_steps(path: Path) -> list[Samples]:
    """Return the batches in steps.npz."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    steps: list[Samples] = []
    while f"{len(steps)}_y" in arrays:
        n = len(steps)
        inputs: list[Any] = []
        while f"{n}_x{len(inputs)}" in arrays:
            inputs.append(arrays[f"{n}_x{len(inputs)}"])
        steps.append(Samples(tuple(inputs), arrays[f"{n}_y"], arrays[f"{n}_sample_weight"]))
    return steps


def train(
    runtime: TaskRuntime, weights: wire.Tensors, steps: list[Samples], settings: Training
) -> dict[str, Any]:
    """Return what training `steps` makes of `weights`: the arrays of result.npz."""
    state = start = runtime.fresh_state(weights)
    losses = []
    for number, step in enumerate(steps):
        result = _step(runtime, state, step, settings, start.weights, number)
        state = result.state
        losses.append(result.loss)
    specs = runtime.task.weights
    final = {spec.name: array for spec, array in zip(specs, state.weights, strict=True)}
    evaluation = runtime.evaluate(final, steps[0])
    arrays: dict[str, Any] = {f"w{i}": a for i, a in enumerate(state.weights)}
    arrays |= {f"o{i}": a for i, a in enumerate(state.slots)}
    arrays["losses"] = np.array(losses)
    arrays["evaluation"] = np.array([evaluation.loss, *evaluation.metrics.values()])
    arrays["output"] = runtime.infer(final, steps[0].inputs)
    return arrays


def main(folder: Path, runtime_name: str, repeat: int) -> None:
    """Train, evaluate and infer as `train`; then time the first step `repeat` times."""
    plan = decode_plan((folder / "plan").read_bytes())
    weights = wire.decode((folder / "weights").read_bytes())
    settings = msgspec.json.decode((folder / "settings.json").read_bytes(), type=Training)
    steps = read_steps(folder / "steps.npz")
    started = time.perf_counter()
    runtime = TaskRuntime(plan, prefer=runtime_name)
    loading = time.perf_counter() - started
    np.savez(folder / "result.npz", **train(runtime, weights, steps, settings))
    start = runtime.fresh_state(weights)
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        _step(runtime, start, steps[0], settings, start.weights, 0)
        times.append(1000 * (time.perf_counter() - started))
    facts = {
        "runtime": runtime.runtime_name,
        "load_ms": 1000 * loading,
        "step_ms": times,
        "peak_mb": peak_memory_bytes() / 1e6,
    }
    (folder / "result.json").write_text(json.dumps(facts), encoding="utf-8")


def _step(
    runtime: TaskRuntime, state: Any, step: Samples, settings: Training, anchor: Any, seed: int
) -> Any:
    return runtime.train_step(state, step.inputs, step.labels, step.weights, settings, anchor, seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
