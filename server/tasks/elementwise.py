"""Gradients of activations and roots, in closed form.

Comparing a tensor with a scalar is ten times slower in TensorFlow Lite than a cast, so
masks are made by casting to bool, which asks for "not zero".
"""

from typing import Any

import tensorflow as tf

__all__ = ["GRADIENTS", "nonzero"]

_SELU_SCALE = 1.0507009873554805
_SELU_SCALE_ALPHA = 1.7580993408473766


def nonzero(x: Any) -> Any:
    """Return 1.0 where `x` is not zero, else 0.0."""
    return tf.cast(tf.cast(x, tf.bool), x.dtype)


def _relu(op: Any, g: Any) -> Any:
    return g * nonzero(op.outputs[0])


def _relu6(op: Any, g: Any) -> Any:
    y = op.outputs[0]
    return g * nonzero(y * 6.0 - y * y)


def _leaky_relu(op: Any, g: Any) -> Any:
    alpha = op.get_attr("alpha")
    return g * (nonzero(tf.nn.relu(op.inputs[0])) * (1.0 - alpha) + alpha)


def _elu(op: Any, g: Any) -> Any:
    return g * (tf.minimum(op.outputs[0], 0.0) + 1.0)


def _selu(op: Any, g: Any) -> Any:
    y = op.outputs[0]
    below = nonzero(tf.minimum(y, 0.0))
    return g * (below * (y + (_SELU_SCALE_ALPHA - _SELU_SCALE)) + _SELU_SCALE)


def _softplus(op: Any, g: Any) -> Any:
    return g * tf.sigmoid(op.inputs[0])


def _softsign(op: Any, g: Any) -> Any:
    return g / tf.square(tf.abs(op.inputs[0]) + 1.0)


def _sigmoid(op: Any, g: Any) -> Any:
    y = op.outputs[0]
    return g * (y - y * y)


def _tanh(op: Any, g: Any) -> Any:
    y = op.outputs[0]
    return g - g * y * y


def _sqrt(op: Any, g: Any) -> Any:
    return g * 0.5 / op.outputs[0]


def _rsqrt(op: Any, g: Any) -> Any:
    y = op.outputs[0]
    return g * -0.5 * y * y * y


def _reciprocal(op: Any, g: Any) -> Any:
    y = op.outputs[0]
    return -(g * y * y)


GRADIENTS = {
    "Relu": _relu,
    "Relu6": _relu6,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Selu": _selu,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    "Sqrt": _sqrt,
    "Rsqrt": _rsqrt,
    "Reciprocal": _reciprocal,
    "Inv": _reciprocal,
}
