"""Convolution, operation by operation: what a training step spends its time on, before and now.

For each geometry the three operations that training needs (forward, gradient of the filter,
gradient of the input), each converted alone and run by the device's runtime with one thread,
beside TensorFlow's own with one thread. "before" is how the gradients were lowered first:
convolutions of swapped tensors and flipped filters (docs/decisions/0012). "other" is the forward
pass as rows and one matrix product, which is not used. "product" is a bare matrix product of the
same size in the device's runtime: what a better lowering could come to. Processor time, so that
a busy machine counts less.

    python -m benchmarks.bench_kernels [--quick]
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import broker_bridge.task.runtime as runtime
from benchmarks.machine import Spread, header, is_quick, table

_, TFLITE = runtime._load_module(None)  # before TensorFlow, or the process ends

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from server.tasks import convolution  # noqa: E402
from server.tasks.pooling import Axis, fit, tap  # noqa: E402

# name, batch, height = width, channels in, channels out, filter, stride; padded to the same size
GEOMETRIES = (
    ("mnist CNN, first", 10, 28, 1, 32, 5, 1),
    ("mnist CNN, second", 10, 14, 32, 64, 5, 1),
    ("digits, second", 10, 4, 16, 32, 3, 1),
    ("32 × 32, 32 → 64", 16, 32, 32, 64, 3, 1),
    ("16 × 16, 64 → 64", 16, 16, 64, 64, 3, 1),
    ("32 × 32, 16 → 32, stride 2", 32, 32, 16, 32, 3, 2),
)
Function = Callable[[Any, Any], Any]


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    repeat = 5 if is_quick() else 40
    header("Convolution, operation by operation")
    rows = [row for geometry in GEOMETRIES for row in _rows(*geometry, repeat)]
    head = ["geometry", "operation", "Mflop", "before, ms", "now, ms", "other, ms",
            "TensorFlow, ms", "product, ms", "now ÷ TensorFlow"]  # fmt: skip
    table(head, rows)


# What it is called, its two inputs, our kernel as it was before and as it is, another way to
# compute the same, what TensorFlow has for it, and the product of matrices that it amounts to.
_Operation = tuple[str, tuple[Any, Any], Any, Function, Any, Function, Any]


def _rows(
    name: str, batch: int, size: int, channels: int, filters: int, kernel: int, stride: int,
    repeat: int,
) -> list[list[str]]:  # fmt: skip
    out = -(-size // stride)
    flop = 2 * batch * out * out * kernel * kernel * channels * filters
    found = []
    operations = _operations(batch, size, channels, filters, kernel, stride)
    for operation, shapes, first, now, other, ours, product in operations:
        _same(first or now, now, shapes)
        _same(other or now, now, shapes)
        spent = _device(now, shapes, repeat)
        beside = _tensorflow(ours, shapes, repeat)
        found.append(
            [
                name,
                operation,
                f"{flop / 1e6:.1f}",
                _device(first, shapes, repeat).text(digits=2) if first else "",
                spent.text(digits=2),
                _device(other, shapes, repeat).text(digits=2) if other else "",
                beside.text(digits=2),
                f"{_device(tf.matmul, product, repeat).median:.2f}",
                f"{spent.median / beside.median:.2f}",
            ]
        )
        name = ""
    return found


def _operations(
    batch: int, size: int, channels: int, filters: int, kernel: int, stride: int
) -> list[_Operation]:
    """The three of a convolution with padding: forward, and its two gradients."""
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    axes = (Axis(size, out, kernel, stride, 1, before),) * 2
    x, g = (batch, size, size, channels), (batch, out, out, filters)
    w = (kernel, kernel, channels, filters)
    reads, taps = batch * out * out, kernel * kernel * channels

    def forward(x: Any, w: Any) -> Any:
        return tf.nn.conv2d(x, w, stride, "SAME")

    def input_now(w: Any, g: Any) -> Any:
        return convolution._input_gradient(w, g, axes, "SAME")

    def filter_now(x: Any, g: Any) -> Any:
        return convolution._filter_gradient(x, g, axes)

    def input_keras(w: Any, g: Any) -> Any:
        return tf.nn.conv2d_transpose(g, w, x, stride, "SAME")

    def filter_keras(inputs: Any, g: Any) -> Any:
        return tf.raw_ops.Conv2DBackpropFilter(
            input=inputs, filter_sizes=w, out_backprop=g, strides=[1, stride, stride, 1],
            padding="SAME",
        )  # fmt: skip

    return [
        ("forward", (x, w), None, forward, _as_rows(axes), forward,
         ((reads, taps), (taps, filters))),
        ("filter gradient", (x, g), _filter_before(axes), filter_now, None, filter_keras,
         ((taps, reads), (reads, filters))),
        ("input gradient", (w, g), _input_before(axes), input_now, None, input_keras,
         ((reads, filters), (filters, taps))),
    ]  # fmt: skip


def _filter_before(axes: tuple[Axis, Axis]) -> Function:
    """x and g with batch and channels swapped, as a convolution."""

    def gradient(x: Any, g: Any) -> Any:
        swapped = tf.transpose(fit(x, axes), [3, 1, 2, 0])
        kernel = tf.transpose(g, [1, 2, 0, 3])
        strides = [axis.stride for axis in axes]
        found = tf.nn.conv2d(swapped, kernel, 1, "VALID", dilations=strides)
        found = found[:, : axes[0].kernel, : axes[1].kernel]
        return tf.transpose(found, [1, 2, 0, 3])

    return gradient


def _input_before(axes: tuple[Axis, Axis]) -> Function:
    """The flipped filter over g with zeros between its rows."""
    return lambda w, g: convolution._input_gradient(w, g, axes, "EXPLICIT")


def _as_rows(axes: tuple[Axis, Axis]) -> Function:
    """The forward pass as one matrix product."""

    def forward(x: Any, w: Any) -> Any:
        height, width = axes
        padded = fit(x, axes)
        taps = [tap(padded, axes, i, j) for i in range(height.kernel) for j in range(width.kernel)]
        rows = tf.reshape(tf.concat(taps, 3), [x.shape[0] * height.out * width.out, -1])
        flat = tf.matmul(rows, tf.reshape(w, [-1, w.shape[3]]))
        return tf.reshape(flat, [x.shape[0], height.out, width.out, w.shape[3]])

    return forward


def _same(one: Function, other: Function, shapes: Any) -> None:
    """Two lowerings of one operation give the same, or their times mean nothing."""
    arrays = [tf.constant(array) for array in _arrays(shapes)]
    np.testing.assert_allclose(one(*arrays), other(*arrays), rtol=1e-3, atol=1e-3)


def _arrays(shapes: Any) -> list[Any]:
    draw = np.random.default_rng(1)
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


def _device(function: Function, shapes: Any, repeat: int) -> Spread:
    """Milliseconds of processor time for one run of `function` in the device's runtime."""
    specs = {f"i{n}": tf.TensorSpec(s, tf.float32, f"i{n}") for n, s in enumerate(shapes)}
    concrete = tf.function(lambda i0, i1: {"o": function(i0, i1)}).get_concrete_function(**specs)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(tf.Module(), folder, signatures={"f": concrete})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["f"])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        model = converter.convert()
    interpreter = TFLITE.Interpreter(model_content=model, num_threads=1)
    run = interpreter.get_signature_runner("f")
    feed = {f"i{n}": array for n, array in enumerate(_arrays(shapes))}
    return _time(lambda: run(**feed), repeat)


def _tensorflow(function: Function, shapes: Any, repeat: int) -> Spread:
    """The same for TensorFlow, compiled."""
    compiled = tf.function(function)
    arrays = [tf.constant(array) for array in _arrays(shapes)]
    return _time(lambda: compiled(*arrays).numpy(), repeat)


def _time(run: Callable[[], object], repeat: int) -> Spread:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeat):
        started = time.process_time()
        run()
        times.append(1000 * (time.process_time() - started))
    return Spread.of(times)


if __name__ == "__main__":
    main()
