"""Gradients of convolutions, as convolutions.

With x [B,H,W,C], filter w [kh,kw,C,K] and g = dL/dy [B,OH,OW,K]:

    dL/dw = (what each filter position read of x, as rows) · g
    dL/dx = conv_transpose(g, w); with dilation: zeros between the rows of g, then a flipped w

Both spatial axes are flipped as one, because tflite-runtime 2.14 reverses only the
first of two axes, silently.
"""

from typing import Any

import tensorflow as tf

from server.tasks.pooling import Axis, axes_of, fit, spread_2d, tap

__all__ = ["GRADIENTS"]

Axes = tuple[Axis, Axis]


def _conv2d(op: Any, g: Any) -> list[Any]:
    x, w = op.inputs
    axes = axes_of(op, x, op.outputs[0], w.shape[:2])
    groups = x.shape[3] // w.shape[2]
    padding = op.get_attr("padding").decode()
    if groups == 1:
        return [_input_gradient(w, g, axes, padding), _filter_gradient(x, g, axes)]
    parts = [
        (_input_gradient(wi, gi, axes, padding), _filter_gradient(xi, gi, axes))
        for xi, wi, gi in zip(
            tf.split(x, groups, 3), tf.split(w, groups, 3), tf.split(g, groups, 3), strict=True
        )
    ]
    return [tf.concat([dx for dx, _ in parts], 3), tf.concat([dw for _, dw in parts], 3)]


def _filter_gradient(x: Any, g: Any, axes: Axes) -> Any:
    """One matrix product: what each filter position read, laid out as rows, times g.

    Twice as fast as a convolution of the swapped tensors in TensorFlow Lite, and it lays
    out no more than that kernel does inside (docs/decisions/0012).
    """
    h, w = axes
    batch, channels, filters = x.shape[0], x.shape[3], g.shape[3]
    across = tf.transpose(fit(x, axes), [3, 0, 1, 2])
    reads = batch * h.out * w.out
    rows = [
        tf.reshape(_read(across, axes, i, j), [channels, reads])
        for i in range(h.kernel)
        for j in range(w.kernel)
    ]
    flat = tf.matmul(tf.concat(rows, axis=0), tf.reshape(g, [reads, filters]))
    return tf.reshape(flat, [h.kernel, w.kernel, channels, filters])


def _read(across: Any, axes: Axes, i: int, j: int) -> Any:
    """Return what filter position (i, j) reads from [C, B, H, W]: [C, B, OH, OW]."""
    h, w = axes
    top, left = i * h.dilation, j * w.dilation
    bottom = top + (h.out - 1) * h.stride + 1
    right = left + (w.out - 1) * w.stride + 1
    return across[:, :, top : bottom : h.stride, left : right : w.stride]


def _input_gradient(w: Any, g: Any, axes: Axes, padding: str) -> Any:
    height, width = axes
    if height.kernel == width.kernel == 1 and height.stride == width.stride == 1:
        flat = tf.matmul(tf.reshape(g, [-1, g.shape[3]]), w[0, 0], transpose_b=True)
        return tf.reshape(flat, [*g.shape[:3], w.shape[2]])
    if height.dilation == width.dilation == 1 and padding in ("SAME", "VALID"):
        shape = [g.shape[0], height.size, width.size, w.shape[2]]
        strides = [height.stride, width.stride]
        return tf.nn.conv2d_transpose(g, w, shape, strides, padding)
    spaced = _spaced(g, axes)
    flipped = tf.transpose(_flip(w), [0, 1, 3, 2])
    return tf.nn.conv2d(
        spaced,
        flipped,
        strides=1,
        dilations=[height.dilation, width.dilation],
        padding="VALID",
    )


def _spaced(g: Any, axes: Axes) -> Any:
    """Put zeros between and around g, so that a VALID convolution gives [B, H, W, ·]."""
    height, width = (a._replace(kernel=1, before=0, size=_gap(a)) for a in axes)
    whole = spread_2d([[g]], (height, width))
    pads = [[0, 0], [0, 0], [0, 0], [0, 0]]
    sizes = whole.shape.as_list()
    begins = [0, 0, 0, 0]
    for axis, a in enumerate(axes, start=1):
        reach = (a.kernel - 1) * a.dilation
        # Row p of the input is read as padded row p + before: the first full row of the
        # transposed convolution is `before`, the last is `before + size - 1`.
        before = reach - a.before
        after = a.size + reach - before - sizes[axis]
        pads[axis] = [max(before, 0), max(after, 0)]
        begins[axis] = max(-before, 0)
        sizes[axis] = a.size + reach
    whole = tf.pad(whole, pads) if any(map(any, pads)) else whole
    return whole if whole.shape.as_list() == sizes else tf.slice(whole, begins, sizes)


def _gap(axis: Axis) -> int:
    return (axis.out - 1) * axis.stride + 1


def _flip(w: Any) -> Any:
    height, width, *rest = w.shape.as_list()
    if height * width == 1:
        return w
    return tf.reshape(tf.reverse(tf.reshape(w, [height * width, *rest]), [0]), w.shape)


def _conv2d_transpose(op: Any, g: Any) -> list[Any]:
    """Conv2DBackpropInput(sizes, w [kh,kw,Out,In], x): the forward pass of Conv2DTranspose."""
    _, w, x = op.inputs
    # Seen from the other side it is a convolution from y (here g) to x.
    axes = axes_of(op, op.outputs[0], x, w.shape[:2])
    dx = tf.nn.conv2d(
        fit(g, axes),
        w,
        strides=[a.stride for a in axes],
        dilations=[a.dilation for a in axes],
        padding="VALID",
    )
    return [None, _filter_gradient(g, x, axes), dx]


def _depthwise(op: Any, g: Any) -> list[Any]:
    x, w = op.inputs
    axes = axes_of(op, x, op.outputs[0], w.shape[:2])
    return [_depthwise_input(w, g, axes), _depthwise_filter(x, g, axes, w.shape[3])]


def _depthwise_input(w: Any, g: Any, axes: Axes) -> Any:
    """Output channel c·M + m comes from input channel c: M depthwise convolutions back."""
    height, width, channels, many = w.shape.as_list()
    spaced = _spaced(g, axes)
    flipped = _flip(w)
    dilations = [a.dilation for a in axes]
    total = None
    for m in range(many):
        part = spaced if many == 1 else spaced[:, :, :, m::many]
        kernel = tf.reshape(flipped[:, :, :, m], [height, width, channels, 1])
        back = tf.nn.depthwise_conv2d(part, kernel, [1, 1, 1, 1], "VALID", dilations=dilations)
        total = back if total is None else total + back
    return total


def _depthwise_filter(x: Any, g: Any, axes: Axes, many: int) -> Any:
    padded = fit(x, axes)
    channels = x.shape[3]
    taps = [
        tf.reduce_sum(_repeat(tap(padded, axes, i, j), many) * g, [0, 1, 2])
        for i in range(axes[0].kernel)
        for j in range(axes[1].kernel)
    ]
    return tf.reshape(tf.stack(taps), [axes[0].kernel, axes[1].kernel, channels, many])


def _repeat(x: Any, many: int) -> Any:
    """Repeat each channel `many` times, neighbours together."""
    if many == 1:
        return x
    shape = x.shape.as_list()
    return tf.reshape(tf.stack([x] * many, axis=4), [*shape[:3], shape[3] * many])


GRADIENTS = {
    "Conv2D": _conv2d,
    "Conv2DBackpropInput": _conv2d_transpose,
    "DepthwiseConv2dNative": _depthwise,
}
