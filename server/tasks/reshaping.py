"""Gradients of slicing and resizing, and the one operation they share: spreading rows.

`spread` is what undoes a strided read: it adds taps back to the places they were read from.
Shapes must be static, which a training graph's always are.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

__all__ = ["GRADIENTS", "resize_rows", "spread"]


def spread(taps: Sequence[Any], *, stride: int, size: int, axis: int) -> Any:
    """Return T [… size …] with T[o·stride + i] = Σ taps[i][o] along `axis`.

    Taps share one shape, with O rows along `axis`; O·stride + len(taps) may pass `size`,
    and what falls beyond is dropped.
    """
    rows = taps[0].shape[axis]
    turns = -(-len(taps) // stride)
    length = rows + turns - 1
    lanes = [
        _sum(
            _padded(taps[turn * stride + lane], turn, length, axis)
            for turn in range(turns)
            if turn * stride + lane < len(taps)
        )
        for lane in range(min(stride, len(taps)))
    ]
    return resize_rows(_interleaved(lanes, stride, axis), size, axis)


def _interleaved(lanes: list[Any], stride: int, axis: int) -> Any:
    """Return row o of every lane, then row o + 1 …; lanes that are missing are zeros."""
    if stride == 1:
        return lanes[0]
    shape = lanes[0].shape.as_list()
    rows, inner = shape[axis], math.prod(shape[axis + 1 :])
    flat = tf.concat([tf.reshape(lane, [-1, rows, inner]) for lane in lanes], axis=2)
    # Padding, not a lane of zeros: that would be stored in the file.
    flat = _padded(flat, 0, stride * inner, 2)
    shape[axis] *= stride
    return tf.reshape(flat, shape)


def resize_rows(x: Any, size: int, axis: int) -> Any:
    """Cut `x` to `size` rows along `axis`, or fill it up with zeros."""
    have = x.shape[axis]
    if have > size:
        sizes = x.shape.as_list()
        sizes[axis] = size
        return tf.slice(x, [0] * len(sizes), sizes)
    return _padded(x, 0, size, axis)


def _padded(x: Any, before: int, length: int, axis: int) -> Any:
    after = length - before - x.shape[axis]
    if before == 0 and after == 0:
        return x
    pads = [[0, 0] for _ in x.shape]
    pads[axis] = [before, after]
    return tf.pad(x, pads)


def _sum(parts: Any) -> Any:
    total = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _strided_slice(op: Any, g: Any) -> list[Any]:
    """Put the slice back where it came from, with zeros around it."""
    shape = op.inputs[0].shape.as_list()
    for axis, taken in enumerate(_taken(op, shape)):
        if isinstance(taken, range):
            g = _put_back(tf.reshape(g, _front(shape, axis, len(taken))), taken, axis, shape)
    return [tf.reshape(g, shape), None, None, None]


def _front(shape: list[int], axis: int, rows: int) -> list[int]:
    """Axes before `axis` are whole again; the rest keep what they have, in one flat axis."""
    return [*shape[:axis], rows, -1]


def _put_back(g: Any, taken: range, axis: int, shape: list[int]) -> Any:
    if len(taken) == shape[axis] and taken.step == 1:
        return g
    step = taken.step
    if step < 0:
        g = tf.reverse(g, [axis])
        taken = range(taken[-1], taken[0] + 1, -step)
    spaced = spread([g], stride=taken.step, size=(len(taken) - 1) * taken.step + 1, axis=axis)
    return _padded(spaced, taken.start, shape[axis], axis)


def _taken(op: Any, shape: list[int]) -> list[range]:
    """Return, for each axis of the input, the rows that the slice took."""
    begin, end, strides = (np.atleast_1d(tf.get_static_value(t)) for t in op.inputs[1:4])
    bit = {
        name: op.get_attr(name)
        for name in ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    }
    new_axes = bin(bit["new_axis_mask"]).count("1")
    taken: list[range] = []
    for i in range(len(begin)):
        if bit["ellipsis_mask"] >> i & 1:
            hidden = len(shape) - (len(begin) - 1 - new_axes)
            taken.extend(range(n) for n in shape[len(taken) : len(taken) + hidden])
        elif bit["new_axis_mask"] >> i & 1:
            continue
        elif bit["shrink_axis_mask"] >> i & 1:
            row = int(begin[i]) % shape[len(taken)]
            taken.append(range(row, row + 1))
        else:
            size = shape[len(taken)]
            first = None if bit["begin_mask"] >> i & 1 else int(begin[i])
            last = None if bit["end_mask"] >> i & 1 else int(end[i])
            taken.append(range(size)[slice(first, last, int(strides[i]))])
    taken.extend(range(n) for n in shape[len(taken) :])
    return taken


def _resize(op: Any, g: Any) -> list[Any]:
    """A resize is one constant matrix per axis; its gradient is their transposes."""
    _, height, width, _ = op.inputs[0].shape.as_list()
    _, out_height, out_width, _ = op.outputs[0].shape.as_list()
    rows = _resize_matrix(op, height, out_height)
    columns = _resize_matrix(op, width, out_width)
    return [tf.einsum("boqc,oh,qw->bhwc", g, rows, columns), None]


def _resize_matrix(op: Any, size: int, out_size: int) -> Any:
    """Return the matrix [out_size, size] that resizes one axis, by resizing the identity."""
    options = {
        "align_corners": op.get_attr("align_corners"),
        "half_pixel_centers": op.get_attr("half_pixel_centers"),
    }
    resize = getattr(tf.raw_ops, op.type)
    with tf.init_scope():
        eye = tf.eye(size)[None, :, :, None]
        return resize(images=eye, size=[out_size, size], **options).numpy()[0, :, :, 0]


GRADIENTS = {
    "StridedSlice": _strided_slice,
    "ResizeBilinear": _resize,
    "ResizeNearestNeighbor": _resize,
}
