"""Time Keras itself on one task's model, in a process of its own: `train_on_batch`.

    python -m benchmarks.keras_steps model.py steps.npz REPEAT [FUNCTION]

prints JSON: milliseconds for each step, peak memory in MB. TensorFlow uses the threads it likes.
"""

import json
import sys
import time
from pathlib import Path

from broker_bridge.machine import peak_memory_bytes
from server.tasks.exporter import load_model_file
from server.tasks.worker import read_steps


def main(model_file: str, steps_file: str, repeat: str, function: str = "model") -> None:
    model, _ = load_model_file(model_file, function)
    step = read_steps(Path(steps_file))[0]
    inputs = step.inputs[0] if len(step.inputs) == 1 else list(step.inputs)
    times = []
    for number in range(int(repeat) + 5):
        started = time.perf_counter()
        model.train_on_batch(inputs, step.labels)
        if number >= 5:  # the first ones compile
            times.append(1000 * (time.perf_counter() - started))
    peak_mb = peak_memory_bytes() / 1e6
    print(json.dumps({"step_ms": times, "peak_mb": peak_mb}))


if __name__ == "__main__":
    main(*sys.argv[1:])
