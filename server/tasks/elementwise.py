"""Gradients of activations and roots, in closed form.

Comparing a tensor with a scalar is ten times slower in TensorFlow Lite than a cast, so
masks are made by casting to bool, which asks for "not zero".
"""

import math
from typing import Any

import tensorflow as tf

__all__ = ["GRADIENTS", "erf", "gelu", "nonzero"]

_SELU_SCALE = 1.0507009873554805
_SELU_SCALE_ALPHA = 1.7580993408473766


def nonzero(x: Any) -> Any:
    """Return 1.0 where `x` is not zero, else 0.0."""
    return tf.cast(tf.cast(x, tf.bool), x.dtype)


@tf.custom_gradient  # type: ignore[untyped-decorator]
def erf(x: Any) -> Any:
    """Return the error function, to 1.5e-7: Abramowitz and Stegun, formula 7.1.26."""
    size = tf.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    tail = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    bell = tf.exp(-size * size)
    value = tf.sign(x) * (1.0 - tail * bell)
    return value, lambda g: g * (2.0 / math.sqrt(math.pi)) * bell


def gelu(x: Any, approximate: bool = True) -> Any:
    """Return x · Φ(x), exact (arXiv 1606.08415) or by the tanh formula."""
    if approximate:
        return tf.nn.gelu(x, approximate=True)
    return 0.5 * x * (1.0 + erf(x * math.sqrt(0.5)))


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
