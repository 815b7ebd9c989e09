"""Is a task file right? Train it beside Keras, step by step, and compare every tensor.

The device side runs in a subprocess with the device's own runtime, because
TensorFlow's interpreter would not show a kernel that is wrong in tflite-runtime 2.14.
The Keras side is the user's model, Keras' own gradients and optimiser, real batches of
their real size. Dropout is fed the same random numbers on both sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import msgspec
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import draw_noise
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Plan, Task, Training
from server.tasks.checks import installed_runtimes, random_steps, run_on_device
from server.tasks.graph import travelling_shape
from server.tasks.objectives import Objective
from server.tasks.tracing import NoiseFeed, drawing, packed

__all__ = ["TOLERANCE", "Reference", "Subject", "check_task", "differences", "reference"]

TOLERANCE = 1e-4
Array = NDArray[Any]
_ADAPTIVE = ("adam", "adamw", "rmsprop", "adagrad")


@dataclass(frozen=True)
class Subject:
    """The Keras side of a task. `variables` are those that travel, in task order."""

    model: Any
    objective: Objective
    optimiser: Any
    variables: tuple[Any, ...]


@dataclass(frozen=True)
class Reference:
    """What Keras made of the same steps."""

    start: tuple[Array, ...]  # weights, in task order
    weights: tuple[Array, ...]
    losses: tuple[float, ...]
    faint: tuple[Array, ...]  # where the gradient was too small to have a sure sign
    output: Array
    evaluation: tuple[float, ...]


def check_task(
    plan: Plan,
    subject: Subject,
    *,
    steps: Sequence[Samples] | None = None,
) -> dict[str, dict[str, float]]:
    """Return, for each runtime installed here, the difference of each tensor from Keras.

    Raises LocalError when one is above `TOLERANCE`.
    """
    steps = steps or random_steps(plan.task, 3)
    settings = _settings(plan.task)
    keras_side = reference(plan.task, subject, steps, settings)
    start = dict(zip((s.name for s in plan.task.weights), keras_side.start, strict=True))
    found = {}
    for name in installed_runtimes():
        result = run_on_device(plan, start, steps, settings, runtime=name)
        found[result.runtime] = differences(plan.task, keras_side, result.arrays)
        worst = max(found[result.runtime], key=lambda n: found[result.runtime][n])
        if not found[result.runtime][worst] <= TOLERANCE:
            raise LocalError(
                f"the task does not train on {result.runtime} as in Keras: {worst!r} differs by "
                f"{found[result.runtime][worst]:.1e} after {len(steps)} steps (allowed: "
                f"{TOLERANCE:.0e}); {_advice(plan.task, subject, steps, settings, keras_side)}"
            )
    return found


def _advice(
    task: Task,
    subject: Subject,
    steps: Sequence[Samples],
    settings: Training,
    keras_side: Reference,
) -> str:
    """What to do about a difference: is it a fault, or what any two sides would differ by?"""
    moved = _sensitivity(task, subject, steps, settings, keras_side)
    if moved <= TOLERANCE:
        return "please report this model, and do not ship the task"
    return (
        f"but Keras itself comes out {moved:.1e} apart when its first weights are one rounding "
        "off, so these steps cannot tell; try a larger batch size or a smaller learning rate"
    )


def _sensitivity(
    task: Task,
    subject: Subject,
    steps: Sequence[Samples],
    settings: Training,
    keras_side: Reference,
) -> float:
    """How far the result moves when each first weight is the next float32 above it."""
    variables = subject.model.variables
    before = [v.numpy() for v in variables]
    try:
        for variable, value in zip(variables, before, strict=True):
            if value.dtype == np.float32:
                variable.assign(np.nextafter(value, np.float32(np.inf)))
        other = _train(task, subject, steps, settings)
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
    arrays = {f"w{i}": value for i, value in enumerate(other.weights)}
    arrays |= {"losses": np.array(other.losses), "evaluation": np.array(other.evaluation)}
    arrays["output"] = other.output
    return max(differences(task, keras_side, arrays).values())


def reference(
    task: Task, subject: Subject, steps: Sequence[Samples], settings: Training
) -> Reference:
    """Train the model with Keras on `steps`, and put it back as it was."""
    variables = subject.model.variables
    before = [v.numpy() for v in variables]
    try:
        return _train(task, subject, steps, settings)
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def differences(task: Task, keras_side: Reference, device: Mapping[str, Array]) -> dict[str, float]:
    """Return for each tensor max |device - Keras|, relative to what training changed.

    Each tensor is measured against its own change, a hundredth of its values, and a tenth
    of the largest change anywhere: below that, float32 has nothing to say.
    """
    moved = [np.abs(k - s).max() for k, s in zip(keras_side.weights, keras_side.start, strict=True)]
    floor = max(0.1 * max(moved), 1e-7)
    found = {}
    for i, spec in enumerate(task.weights):
        value, wanted = device[f"w{i}"], keras_side.weights[i]
        gap = np.where(keras_side.faint[i], 0.0, np.abs(value - wanted)).max()
        scale = max(moved[i], floor, 0.01 * np.abs(wanted).max())
        found[spec.name] = float(gap / scale)
    found["loss"] = _relative(device["losses"], np.array(keras_side.losses))
    found["evaluation"] = _relative(device["evaluation"], np.array(keras_side.evaluation))
    found["output"] = _relative(device["output"], keras_side.output)
    return found


def _relative(value: Array, wanted: Array) -> float:
    return float(np.abs(value - wanted).max() / max(1.0, np.abs(wanted).max()))


def _settings(task: Task) -> Training:
    """Every input of the graph takes part: the proximal term and the clip are on."""
    return msgspec.structs.replace(task.defaults, proximal_mu=0.1, clip_norm=1.0)


def _fresh(optimiser: Any, settings: Training) -> Any:
    new = type(optimiser).from_config(optimiser.get_config())
    new.global_clipnorm = None  # the task clips by its own setting
    new.learning_rate = settings.learning_rate
    # Which weights do not decay is said after the optimiser is made, and not in its config.
    new._use_weight_decay = optimiser._use_weight_decay
    return new


def _train(task: Task, subject: Subject, steps: Sequence[Samples], settings: Training) -> Reference:
    model, objective = subject.model, subject.objective
    optimiser = _fresh(subject.optimiser, settings)
    start = _values(subject)
    trainable = model.trainable_variables
    faint = [np.zeros(array.shape, bool) for array in start]
    losses = []
    for number, step in enumerate(steps):
        noise = draw_noise(task, number)
        loss, gradients = _gradients(task, model, objective, step, noise)
        gradients = _shaped(gradients, trainable, start, settings)
        if task.optimiser in _ADAPTIVE:
            _mark_faint(faint, gradients)
        optimiser.apply(gradients, trainable)
        losses.append(float(loss))
    output, evaluation = _judge(model, objective, steps[0])
    return Reference(
        start,
        _values(subject),
        tuple(losses),
        tuple(faint),
        output,
        evaluation,
    )


def _values(subject: Subject) -> tuple[Array, ...]:
    return tuple(v.numpy().reshape(travelling_shape(v)) for v in subject.variables)


def _gradients(
    task: Task, model: Any, objective: Objective, step: Samples, noise: list[Any]
) -> tuple[Any, list[Any]]:
    rows = len(step)
    own = [n[:rows] if n.shape[0] == task.batch_size else n for n in noise]
    with drawing(NoiseFeed([tf.constant(n) for n in own])), tf.GradientTape() as tape:
        output = model(_fed(model, step), training=True)
        weights = objective.row_weights(step.labels, output, step.weights)
        loss = objective.loss(step.labels, output, sample_weight=weights)
        loss = tf.add_n([loss, *map(tf.reduce_sum, model.losses)])
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return loss, [tf.convert_to_tensor(g) for g in gradients]


def _shaped(
    gradients: list[Any], variables: list[Any], start: tuple[Array, ...], settings: Training
) -> list[Any]:
    if settings.clip_norm:
        gradients, _ = tf.clip_by_global_norm(gradients, settings.clip_norm)
    if not settings.proximal_mu:
        return gradients
    return [
        g + settings.proximal_mu * (v.value - a.reshape(v.shape))
        for g, v, a in zip(gradients, variables, start, strict=False)
    ]


def _mark_faint(faint: list[Array], gradients: list[Any]) -> None:
    """Adaptive rules divide by the gradient's size: where that is all rounding, so is the step."""
    largest = max(np.abs(g.numpy()).max() for g in gradients)
    for mask, gradient in zip(faint, gradients, strict=False):
        mask |= np.abs(gradient.numpy()).reshape(mask.shape) < 1e-4 * largest


def _judge(model: Any, objective: Objective, step: Samples) -> tuple[Array, tuple[float, ...]]:
    output = model(_fed(model, step), training=False)
    sums, counts = objective.sums(tf.constant(step.labels), output, tf.constant(step.weights))
    means = (sums / counts).numpy()
    means[0] += sum(float(tf.reduce_sum(p)) for p in model.losses)
    return keras.ops.convert_to_numpy(output), tuple(float(m) for m in means)


def _fed(model: Any, step: Samples) -> Any:
    return packed(model, [tf.constant(array) for array in step.inputs])
