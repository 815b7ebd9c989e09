"""Trace a user's Keras model as it is, in forms that TensorFlow Lite can hold.

While `convertible(model, …)` is active
- recurrent layers are unrolled: a loop does not lower;
- random layers draw from tensors that the device feeds, not from a seed frozen at export;
- batch statistics leave out the rows that only fill up a short batch.
The model is given back unchanged. This reaches into Keras by private names, so Keras is
pinned with TensorFlow, and the coverage tests are the gate for an upgrade.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Noise
from server.tasks import elementwise

__all__ = ["NoiseFeed", "all_layers", "call", "convertible", "drawing", "packed"]


class NoiseFeed:
    """Random numbers for one trace: only counted, or taken from `tensors` in order."""

    def __init__(self, tensors: list[Any] | None = None) -> None:
        self.wanted: list[Noise] = []
        self._tensors = tensors

    def draw(self, kind: str, shape: Any) -> Any:
        """Return random numbers of a static `shape`."""
        static = tf.get_static_value(tf.convert_to_tensor(shape, tf.int32))
        if static is None:
            raise LocalError(
                "a random layer asks for numbers of a shape that depends on the data; "
                "give it a fixed noise_shape"
            )
        self.wanted.append(Noise(kind, tuple(int(n) for n in static)))
        if self._tensors is None:
            return tf.fill(static, 0.5)
        return self._tensors[len(self.wanted) - 1]


def all_layers(model: Any) -> list[Any]:
    """Return the model's layers and the layers within them."""
    return list(model._flatten_layers(include_self=False))


def call(
    model: Any, trainable: list[Any], fixed: list[Any], inputs: list[Any], *, training: bool
) -> tuple[Any, list[Any], list[Any]]:
    """Return (output, new non-trainable values, penalties) of `model` with these weights.

    As `model.stateless_call`, but through `__call__`, as `fit` does: so that masks, and
    `training` inside layers that do not pass it on, arrive where they should.
    """
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    mapping = list(zip(variables, [*trainable, *fixed], strict=True))
    fed = packed(model, inputs)
    with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
        output = model(fed, training=training)
        penalties = list(model.losses)
    new = [scope.get_current_value(v) for v in model.non_trainable_variables]
    return output, new, penalties


def packed(model: Any, inputs: list[Any]) -> Any:
    """Return `inputs` in the structure that the model was built with: one, a list or a dict."""
    structure = getattr(model, "_inputs_struct", None)
    if isinstance(structure, dict):
        names = [tensor.name for tensor in model.inputs]
        by_name = dict(zip(names, inputs, strict=True))
        return {key: by_name[tensor.name] for key, tensor in structure.items()}
    return inputs[0] if len(inputs) == 1 else inputs


@contextmanager
def drawing(noise: NoiseFeed) -> Iterator[None]:
    """Let random layers draw from `noise` inside this block."""
    with ExitStack() as swaps:
        for name, draw in _draws(noise).items():
            swaps.enter_context(_swapped(backend.random, name, draw))
        yield


@contextmanager
def convertible(model: Any, noise: NoiseFeed, *, present: Any | None = None) -> Iterator[None]:
    """Make `model` traceable inside this block.

    `present` [batch] is 1 for real rows and 0 for those that fill up a short batch.
    """
    with ExitStack() as swaps:
        for layer in all_layers(model):
            if isinstance(layer, keras.layers.RNN):
                swaps.enter_context(_swapped(layer, "unroll", True))
                if hasattr(layer, "use_cudnn"):
                    swaps.enter_context(_swapped(layer, "use_cudnn", False))
        swaps.enter_context(drawing(noise))
        for owner, name, function in _PLAIN:
            swaps.enter_context(_swapped(owner, name, function))
        if present is not None:
            kind = keras.layers.BatchNormalization
            swaps.enter_context(_swapped(kind, "_moments", _moments(kind._moments, present)))
            for layer in all_layers(model):
                if (penalty := layer.activity_regularizer) is not None:
                    real = _of_real_rows(penalty, present)
                    swaps.enter_context(_swapped(layer, "activity_regularizer", real))
        yield


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _arg(function: Any) -> Callable[..., Any]:
    def arg(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        x = tf.reshape(x, [-1]) if axis is None else tf.convert_to_tensor(x)
        place = function(x, axis=-1 if axis is None else axis, output_type=tf.int32)
        return tf.expand_dims(place, axis or 0) if keepdims else place

    return arg


# What Keras computes with ops that have no builtin kernel. Its argmax tells -0.0 from 0.0
# by their bits.
_PLAIN = (
    (backend.numpy, "argmax", _arg(tf.argmax)),
    (backend.numpy, "argmin", _arg(tf.argmin)),
    (backend.nn, "gelu", elementwise.gelu),
    (backend.math, "erf", elementwise.erf),
)


def _draws(noise: NoiseFeed) -> dict[str, Callable[..., Any]]:
    """Return replacements for the functions of keras.random that layers call."""

    def dropout(inputs: Any, rate: float, noise_shape: Any = None, seed: Any = None) -> Any:
        del seed
        if rate == 0.0:
            return inputs
        shape = [
            size if wanted is None else wanted
            for size, wanted in zip(inputs.shape, noise_shape or inputs.shape, strict=True)
        ]
        # floor(u + keep) is 1 with probability `keep`, and faster than a comparison.
        kept = tf.floor(noise.draw("uniform", shape) + (1.0 - rate))
        return inputs * (kept * (1.0 / (1.0 - rate)))

    def uniform(
        shape: Any, minval: Any = 0.0, maxval: Any = 1.0, dtype: Any = None, seed: Any = None
    ) -> Any:
        del dtype, seed
        return noise.draw("uniform", shape) * (maxval - minval) + minval

    def normal(
        shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = None, seed: Any = None
    ) -> Any:
        del dtype, seed
        return noise.draw("normal", shape) * stddev + mean

    def refused(name: str) -> Callable[..., Any]:
        def draw(*_: Any, **__: Any) -> Any:
            raise LocalError(
                f"keras.random.{name} cannot run on a device: "
                "use keras.random.uniform, normal or dropout"
            )

        return draw

    others = ("categorical", "randint", "truncated_normal", "shuffle", "gamma", "binomial", "beta")
    draws: dict[str, Callable[..., Any]] = {name: refused(name) for name in others}
    return draws | {"dropout": dropout, "uniform": uniform, "normal": normal}


def _moments(original: Callable[..., Any], present: Any) -> Callable[..., Any]:
    """Return BatchNormalization's mean and variance, over the real rows only."""

    def moments(layer: Any, inputs: Any, mask: Any) -> Any:
        if inputs.shape[0] != present.shape[0]:
            return original(layer, inputs, mask)  # time folded into the batch: all rows count
        axes = layer._reduction_axes
        inner = [axis for axis in axes if axis != 0]
        row = tf.reshape(present, [-1] + [1] * (inputs.shape.rank - 1))
        if mask is None:
            total = tf.reduce_sum(present)
            mean = _weighted(_inner_mean(inputs, inner), row, total)
            variance = _weighted(_inner_mean(tf.square(inputs - mean), inner), row, total)
        else:
            row = row * tf.cast(mask, inputs.dtype)[..., None]
            total = tf.reduce_sum(row)
            mean = _weighted(inputs * row, 1.0, total, axes)
            variance = _weighted(tf.square(inputs - mean) * row, 1.0, total, axes)
        return tf.squeeze(mean, axes), tf.squeeze(variance, axes)

    return moments


def _of_real_rows(penalty: Callable[[Any], Any], present: Any) -> Callable[[Any], Any]:
    """Return an activity regulariser that counts the real rows only: Keras divides it by all."""

    def counted(output: Any) -> Any:
        if output.shape[0] != present.shape[0]:
            return penalty(output)
        row = tf.reshape(present, [-1] + [1] * (output.shape.rank - 1))
        share = tf.maximum(tf.reduce_sum(present), 1.0) / present.shape[0]
        return penalty(output * row) / share

    return counted


def _inner_mean(x: Any, axes: list[int]) -> Any:
    return tf.reduce_mean(x, axes, keepdims=True) if axes else x


def _weighted(x: Any, row: Any, total: Any, axes: Any = (0,)) -> Any:
    return tf.reduce_sum(x * row, axes, keepdims=True) / total
