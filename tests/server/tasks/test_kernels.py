"""Gradients as the device's kernels compute them, over many geometries, in both runtimes.

test_gradients.py compares formulas inside TensorFlow; a kernel that is wrong on the
device (as REVERSE_V2 over two axes is in tflite-runtime 2.14) shows only here.
"""

import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from broker_bridge.task import runtime
from server.tasks.checks import installed_runtimes
from server.tasks.gradients import builtin_gradients

Case = tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...]]


def convolutions() -> list[Case]:
    return [
        (f"kernel {k}, stride {s}, dilation {d}, {p}",
         lambda x, w, s=s, d=d, p=p: tf.nn.conv2d(x, w, s, p, dilations=d),
         ((2, 8, 9, 3), (*k, 3, 4)))
        for k, s, d, p in product([(1, 1), (3, 3), (2, 3), (1, 4)], [1, 2, 3], [1, 2],
                                  ["SAME", "VALID"])
        if s == 1 or d == 1
    ]  # fmt: skip


def transposed() -> list[Case]:
    def transpose(x: Any, w: Any, s: int, p: str) -> Any:
        size = 4 * s if p == "SAME" else 3 * s + max(w.shape[0], s)
        return tf.nn.conv2d_transpose(x, w, [2, size, size, 4], s, p)

    return [
        (f"kernel {k}, stride {s}, {p}",
         lambda x, w, s=s, p=p: transpose(x, w, s, p),
         ((2, 4, 4, 3), (k, k, 4, 3)))
        for k, s, p in product([1, 2, 3], [1, 2, 3], ["SAME", "VALID"])
    ]  # fmt: skip


def depthwise() -> list[Case]:
    return [
        (f"kernel {k}, stride {s}, multiplier {m}, {p}",
         lambda x, w, s=s, p=p: tf.nn.depthwise_conv2d(x, w, [1, s, s, 1], p),
         ((2, 7, 8, 3), (*k, 3, m)))
        for k, s, m, p in product([(1, 1), (3, 3), (2, 3)], [1, 2], [1, 2], ["SAME", "VALID"])
    ]  # fmt: skip


def pools() -> list[Case]:
    return [
        (f"{pool.__name__}, kernel {k}, stride {s}, {p}",
         lambda x, pool=pool, k=k, s=s, p=p: pool(x, k, s, p),
         ((2, 8, 9, 3),))
        for pool, k, s, p in product(
            [tf.nn.max_pool2d, tf.nn.avg_pool2d], [2, 3, (3, 2)], [1, 2, 3], ["SAME", "VALID"])
    ]  # fmt: skip


def gradients_of(cases: list[Case]) -> Callable[..., dict[str, Any]]:
    """Return one function that differentiates every case: c{i}_{j} is input j of case i."""

    def gradients(**feed: Any) -> dict[str, Any]:
        found = {}
        for i, (_, function, shapes) in enumerate(cases):
            inputs = [feed[f"c{i}_{j}"] for j in range(len(shapes))]
            y = tf.reshape(function(*inputs), [-1])
            weighted = y * np.cos(np.arange(y.shape[0], dtype=np.float32))
            for j, gradient in enumerate(tf.gradients(weighted, inputs)):
                found[f"g{i}_{j}"] = gradient
        return found

    return gradients


def converted(function: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(tf.Module(), folder, signatures={"f": function})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["f"])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        return bytes(converter.convert())


@pytest.mark.parametrize("cases", [convolutions, transposed, depthwise, pools])
def test_kernels_compute_the_gradients_of_tensorflow(cases: Callable[[], list[Case]]) -> None:
    chosen = cases()
    draw = np.random.default_rng(0)
    feed = {
        f"c{i}_{j}": draw.normal(size=shape).astype(np.float32)
        for i, (_, _, shapes) in enumerate(chosen)
        for j, shape in enumerate(shapes)
    }
    specs = {name: tf.TensorSpec(array.shape, tf.float32, name) for name, array in feed.items()}
    gradients = gradients_of(chosen)
    wanted = tf.function(gradients)(**{name: tf.constant(a) for name, a in feed.items()})
    with builtin_gradients():
        traced = tf.function(gradients).get_concrete_function(**specs)
    model = converted(traced)
    for name in installed_runtimes():
        _, module = runtime._load_module(name)
        found = module.Interpreter(model_content=model).get_signature_runner("f")(**feed)
        for i, (title, _, shapes) in enumerate(chosen):
            for j in range(len(shapes)):
                expected = wanted[f"g{i}_{j}"].numpy()
                scale = max(1.0, np.abs(expected).max())
                np.testing.assert_allclose(
                    found[f"g{i}_{j}"], expected, atol=2e-5 * scale, err_msg=f"{name}: {title}"
                )
