"""A training step of each ready task: in the device runtimes, in Keras, and the MLP in NumPy.

Each in a process of its own, one after the other, on the same random batch. The device
runtimes use one thread; Keras uses as many as TensorFlow likes. Rounds of all contestants are
interleaved, so that a busy machine is busy for all.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import Spread, header, is_quick, table
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import decode_task
from server.tasks.checks import arrays_of, installed_runtimes, random_steps, run_on_device

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = ("wearables", "digits", "keyboard", "turbines", "aircraft", "mnist", "mnist-cnn")
PEAK_TARGET_MB = 70
_MODEL = {"mnist-cnn": ("mnist", "cnn")}


def main() -> None:
    rounds, repeat = (1, 10) if is_quick() else (5, 40)
    header("Training: one step of each ready task")
    names = [word for word in sys.argv[1:] if not word.startswith("-")] or TASKS
    with tempfile.TemporaryDirectory() as scratch:
        rows = [_row(name, Path(scratch), rounds, repeat) for name in names]
    runtimes = installed_runtimes()
    head = ["task", "parameters", "plan, kB", "batch", *(f"{r}, ms" for r in runtimes),
            "Keras, ms", "NumPy, ms", "Keras ÷ first", *(f"{r}, peak MB" for r in runtimes),
            "Keras, peak MB", "load, ms", "steps/epoch of 500, s"]  # fmt: skip
    table(head, rows)
    print(f"  reach: a device process of at most {PEAK_TARGET_MB} MB for wearables and digits")


def _row(name: str, scratch: Path, rounds: int, repeat: int) -> list[str]:
    folder, function = _MODEL.get(name, (name, "model"))
    model = EXAMPLES / folder / "model.py"
    task_file = EXAMPLES / folder / f"{name}.task"
    if not task_file.exists():
        task_file = scratch / f"{name}.task"
        _build(model, function, name, task_file)
    plan, weights = decode_task(task_file.read_bytes())
    steps = random_steps(plan.task, 1)
    batch = _full(steps[0], plan.task.batch_size)
    np.savez(scratch / "steps.npz", **arrays_of([batch]))
    runtimes = installed_runtimes()
    times: dict[str, list[float]] = {who: [] for who in (*runtimes, "keras", "numpy")}
    peaks: dict[str, float] = {}
    loads = []
    for _ in range(rounds):
        for runtime in runtimes:
            found = run_on_device(
                plan, weights, [batch], plan.task.defaults, runtime=runtime, repeat=repeat
            )
            times[runtime] += found.step_ms[2:]
            peaks[runtime] = max(peaks.get(runtime, 0.0), found.peak_mb)
            loads.append(found.load_ms)
        facts = _keras(model, function, scratch / "steps.npz", repeat)
        times["keras"] += facts["step_ms"]
        peaks["keras"] = facts["peak_mb"]
        if name == "mnist":
            times["numpy"] += _numpy_steps(weights, batch, repeat)
    spread = {who: Spread.of(values) for who, values in times.items() if values}
    first = spread[runtimes[0]].median
    return [
        name,
        f"{plan.task.parameters:,}",
        f"{plan.task.tflite_bytes / 1000:.0f}",
        str(plan.task.batch_size),
        *(spread[r].text(digits=3) for r in runtimes),
        spread["keras"].text(digits=2),
        spread["numpy"].text(digits=3) if "numpy" in spread else "",
        f"{spread['keras'].median / first:.2f}",
        *(f"{peaks[r]:.0f}" for r in runtimes),
        f"{peaks['keras']:.0f}",
        f"{np.median(loads):.1f}",
        f"{first * -(-500 // plan.task.batch_size) / 1000:.2f}",
    ]


def _full(step: Samples, rows: int) -> Samples:
    """Return `step` filled up to a whole batch."""
    take = np.arange(rows) % len(step)
    return Samples(tuple(x[take] for x in step.inputs), step.labels[take], None)


def _build(model: Path, function: str, name: str, out: Path) -> None:
    command = [sys.executable, "-m", "server.tasks.cli", "build", str(model), "-o", str(out)]
    subprocess.run(
        [*command, "--function", function, "--name", name], check=True, capture_output=True
    )


def _keras(model: Path, function: str, steps: Path, repeat: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.keras_steps", str(model), str(steps), str(repeat)]
    done = subprocess.run([*command, function], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _numpy_steps(weights: Any, step: Samples, repeat: int) -> list[float]:
    """Time plain SGD on a ReLU network with softmax, written by hand."""
    layers = [np.array(w) for w in weights.values()]
    x, y = step.inputs[0], step.labels
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        activations = [x]
        for i in range(0, len(layers), 2):
            z = activations[-1] @ layers[i] + layers[i + 1]
            activations.append(np.maximum(z, 0) if i < len(layers) - 2 else z)
        shares = np.exp(activations[-1] - activations[-1].max(1, keepdims=True))
        g = shares / shares.sum(1, keepdims=True)
        g[np.arange(len(y)), y] -= 1
        g /= len(y)
        for i in range(len(layers) - 2, -1, -2):
            back = (g @ layers[i].T) * (activations[i // 2] > 0)
            layers[i] -= 0.1 * (activations[i // 2].T @ g)
            layers[i + 1] -= 0.1 * g.sum(0)
            g = back
        times.append(1000 * (time.perf_counter() - started))
    return times[2:]


if __name__ == "__main__":
    main()
