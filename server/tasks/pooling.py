"""Gradients of pooling, tap by tap.

A pooling window of kh × kw is kh·kw strided reads of the padded input ("taps"). Its
gradient masks or scales each tap and spreads them back. Ties go to the first
maximum, as in TensorFlow.
"""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from server.tasks.elementwise import nonzero
from server.tasks.reshaping import resize_rows, spread

__all__ = ["GRADIENTS", "Axis", "axes_of", "fit", "spread_2d", "tap"]

_LOWEST = -3.0e38  # below every activation, and far enough from infinity to subtract


class Axis(NamedTuple):
    """One spatial axis of a windowed op: input size, output size, kernel, stride, dilation, pad."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    before: int

    @property
    def span(self) -> int:
        """How many padded rows the op really reads."""
        return (self.out - 1) * self.stride + (self.kernel - 1) * self.dilation + 1


def axes_of(op: Any, x: Any, y: Any, kernel: tuple[int, int]) -> tuple[Axis, Axis]:
    """Return the height and width axes of a windowed op from `x` to `y` [B, H, W, C]."""
    strides = op.get_attr("strides")
    dilations = _attribute(op, "dilations") or [1, 1, 1, 1]
    padding = op.get_attr("padding").decode()
    explicit = _attribute(op, "explicit_paddings") or [0] * 8
    axes = []
    for i in (1, 2):
        size, out, k = x.shape[i], y.shape[i], kernel[i - 1]
        span = (out - 1) * strides[i] + (k - 1) * dilations[i] + 1
        before = {"SAME": max(span - size, 0) // 2, "VALID": 0}.get(padding, explicit[2 * i])
        axes.append(Axis(size, out, k, strides[i], dilations[i], before))
    return axes[0], axes[1]


def fit(x: Any, axes: tuple[Axis, Axis], value: float = 0.0) -> Any:
    """Pad and cut `x` [B, H, W, C] to exactly the rows and columns that the op reads."""
    pads = [[0, 0], *([a.before, max(a.span - a.before - a.size, 0)] for a in axes), [0, 0]]
    if any(map(any, pads)):
        x = tf.pad(x, pads, constant_values=value)
    for axis, a in enumerate(axes, start=1):
        x = resize_rows(x, a.span, axis)
    return x


def tap(padded: Any, axes: tuple[Axis, Axis], i: int, j: int) -> Any:
    """Return what kernel position (i, j) reads: [B, OH, OW, C]."""
    h, w = axes
    top, left = i * h.dilation, j * w.dilation
    bottom = top + (h.out - 1) * h.stride + 1
    right = left + (w.out - 1) * w.stride + 1
    return padded[:, top : bottom : h.stride, left : right : w.stride, :]


def spread_2d(taps: list[list[Any]], axes: tuple[Axis, Axis]) -> Any:
    """Add taps[i][j] back to where `tap` read them: the gradient of `fit` and `tap`."""
    h, w = axes
    rows = [spread(row, stride=w.stride, size=_reach(w), axis=2) for row in taps]
    whole = spread(rows, stride=h.stride, size=_reach(h), axis=1)
    return tf.slice(whole, [0, h.before, w.before, 0], [whole.shape[0], h.size, w.size, -1])


def _reach(axis: Axis) -> int:
    return max(axis.span, axis.before + axis.size)


def _attribute(op: Any, name: str) -> Any:
    try:
        return op.get_attr(name)
    except ValueError:
        return None


def _pool_axes(op: Any) -> tuple[Axis, Axis]:
    _, height, width, _ = op.get_attr("ksize")
    return axes_of(op, op.inputs[0], op.outputs[0], (height, width))


def _max_pool(op: Any, g: Any) -> Any:
    x, y = op.inputs[0], op.outputs[0]
    axes = _pool_axes(op)
    padded = fit(x, axes, _LOWEST)
    left = g  # what no maximum has taken yet: each window's first one takes all of it
    taps: list[list[Any]] = []
    for i in range(axes[0].kernel):
        taps.append([])
        for j in range(axes[1].kernel):
            after = left * nonzero(y - tap(padded, axes, i, j))
            taps[-1].append(left - after)
            left = after
    return spread_2d(taps, axes)


def _avg_pool(op: Any, g: Any) -> Any:
    # The input of AvgPool is [B, H, W, C], so the op's own shapes say all.
    axes = _pool_axes(op)
    share = g / tf.constant(np.outer(*map(_count, axes))[None, :, :, None], g.dtype)
    return spread_2d([[share] * axes[1].kernel] * axes[0].kernel, axes)


def _count(axis: Axis) -> Any:
    """Return how many real rows each window of one axis covers."""
    starts = np.arange(axis.out) * axis.stride - axis.before
    return np.minimum(starts + axis.kernel, axis.size) - np.maximum(starts, 0)


GRADIENTS = {"MaxPool": _max_pool, "AvgPool": _avg_pool}
