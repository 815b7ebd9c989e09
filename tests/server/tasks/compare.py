"""Train a model in Keras and as a task, and say how far apart they end."""

from typing import Any

import keras
import msgspec
import numpy as np

from broker_bridge.task.runtime import TaskRuntime
from server.tasks import worker
from server.tasks.checks import installed_runtimes, random_steps, run_on_device
from server.tasks.exporter import export
from server.tasks.options import TaskOptions
from server.tasks.selfcheck import reference

__all__ = ["classifier", "compare"]


def classifier(
    inputs: Any, outputs: Any, *, optimiser: Any = None, loss: Any = None, metrics: Any = ()
) -> Any:
    """Return a compiled functional model; `outputs` are logits unless `loss` says otherwise."""
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=optimiser or keras.optimizers.SGD(0.05),
        loss=loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=list(metrics),
    )
    return model


def compare(
    model: Any,
    *,
    steps: int = 20,
    batch_size: int = 4,
    proximal_mu: float = 0.0,
    clip_norm: float = 0.0,
    runtimes: list[str] | None = None,
    options: TaskOptions | None = None,
) -> dict[str, dict[str, float]]:
    """Return {runtime: {tensor: max |device - Keras| / max(1, max |Keras|)}} after `steps`.

    The last step is a short batch. Losses, evaluation and outputs are compared as well.
    """
    options = options or TaskOptions(
        name="compared", batch_size=batch_size, evaluation_batch_size=batch_size
    )
    built = export(model, options)
    settings = msgspec.structs.replace(
        built.task.defaults, proximal_mu=proximal_mu, clip_norm=clip_norm
    )
    batches = random_steps(built.task, steps)
    expected = reference(built.task, built.subject, batches, settings)
    names = [spec.name for spec in built.task.weights]
    start = dict(zip(names, expected.start, strict=True))
    found = {}
    for name in runtimes or installed_runtimes():
        if name == "tflite-runtime":  # conftest.py imported it before TensorFlow: no detour
            device = worker.train(TaskRuntime(built.plan, prefer=name), start, batches, settings)
        else:
            device = run_on_device(built.plan, start, batches, settings, runtime=name).arrays
        pairs = {n: (device[f"w{i}"], expected.weights[i]) for i, n in enumerate(names)}
        pairs["loss"] = device["losses"], np.array(expected.losses)
        pairs["evaluation"] = device["evaluation"], np.array(expected.evaluation)
        pairs["output"] = device["output"], expected.output
        found[name] = {n: _difference(*pair) for n, pair in pairs.items()}
        moved = [
            n
            for n, s, e in zip(names, expected.start, expected.weights, strict=True)
            if (s != e).any()
        ]
        assert moved == names, f"training did not change {set(names) - set(moved)}"
    return found


def _difference(value: Any, wanted: Any) -> float:
    assert value.shape == wanted.shape, f"{value.shape} instead of {wanted.shape}"
    gap = float(np.abs(value - wanted).max() / max(1.0, np.abs(wanted).max()))
    return gap if np.isfinite(gap) else float("inf")
