"""Each gradient that replaces TensorFlow's own gives its numbers, over many geometries."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from broker_bridge.errors import LocalError
from server.tasks import gradients
from server.tasks.elementwise import erf
from server.tasks.gradients import builtin_gradients

Function = Callable[..., Any]


def values(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_gradients(function: Function, *inputs: Any, tolerance: float = 2e-5) -> None:
    def gradient(*x: Any) -> Any:
        y = tf.reshape(function(*x), [-1])
        return tf.gradients(y * np.cos(np.arange(y.shape[0], dtype=np.float32)), x)

    wanted = tf.function(gradient).get_concrete_function(*inputs)(*map(tf.constant, inputs))
    with builtin_gradients():
        traced = tf.function(gradient).get_concrete_function(*inputs)
    found = traced(*map(tf.constant, inputs))
    kinds = {op.type for op in traced.graph.get_operations()}
    assert not {kind for kind in kinds if kind.endswith(("Grad", "BackpropFilter"))}, kinds
    for f, w in zip(found, wanted, strict=True):
        scale = max(1.0, float(tf.reduce_max(tf.abs(w))))
        np.testing.assert_allclose(f, w, atol=tolerance * scale)


CONVOLUTIONS = [
    (kernel, stride, dilation, padding)
    for kernel, stride, dilation, padding in product(
        [(1, 1), (2, 2), (3, 3), (3, 2), (1, 4)], [1, 2, 3], [1, 2], ["SAME", "VALID"]
    )
    if stride == 1 or dilation == 1
]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "padding"), CONVOLUTIONS)
def test_convolution(kernel: Any, stride: int, dilation: int, padding: str) -> None:
    def conv(x: Any, w: Any) -> Any:
        return tf.nn.conv2d(x, w, stride, padding, dilations=dilation)

    for height, width in ((8, 9), (7, 7)):
        assert_same_gradients(conv, values(1, 2, height, width, 3), values(2, *kernel, 3, 4))


@pytest.mark.parametrize("groups", [2, 3])
def test_convolution_in_groups(groups: int) -> None:
    # TensorFlow on a CPU has no gradient of its own here: compare with separate convolutions.
    x, w = values(1, 2, 6, 6, 6), values(2, 3, 3, 6 // groups, 6)

    def grouped(x: Any, w: Any) -> Any:
        return tf.nn.conv2d(x, w, 1, "SAME")

    def separate(x: Any, w: Any) -> Any:
        parts = zip(tf.split(x, groups, 3), tf.split(w, groups, 3), strict=True)
        return tf.concat([tf.nn.conv2d(xi, wi, 1, "SAME") for xi, wi in parts], 3)

    def gradient(function: Function) -> Any:
        with builtin_gradients():
            return tf.function(
                lambda x, w: tf.gradients(tf.square(function(x, w)), [x, w]), jit_compile=True
            )(tf.constant(x), tf.constant(w))

    for found, wanted in zip(gradient(grouped), gradient(separate), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), list(product([1, 2, 3, 4], [1, 2, 3], ["SAME", "VALID"]))
)
def test_transposed_convolution(kernel: int, stride: int, padding: str) -> None:
    size = 5 * stride if padding == "SAME" else 4 * stride + max(kernel, stride)

    def transposed(x: Any, w: Any) -> Any:
        return tf.nn.conv2d_transpose(x, w, [2, size, size, 4], stride, padding)

    assert_same_gradients(transposed, values(1, 2, 5, 5, 3), values(2, kernel, kernel, 4, 3))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "many"),
    list(product([(1, 1), (3, 3), (2, 3)], [1, 2, 3], ["SAME", "VALID"], [1, 2])),
)
def test_depthwise_convolution(kernel: Any, stride: int, padding: str, many: int) -> None:
    def depthwise(x: Any, w: Any) -> Any:
        return tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding)

    assert_same_gradients(depthwise, values(1, 2, 7, 8, 3), values(2, *kernel, 3, many))


@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_dilated_depthwise_convolution(dilation: int, padding: str) -> None:
    def depthwise(x: Any, w: Any) -> Any:
        return tf.nn.depthwise_conv2d(x, w, [1] * 4, padding, dilations=[dilation] * 2)

    assert_same_gradients(depthwise, values(1, 2, 9, 8, 3), values(2, 3, 3, 3, 1))


@pytest.mark.parametrize("pool", [tf.nn.max_pool2d, tf.nn.avg_pool2d])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    list(product([1, 2, 3, (3, 2)], [1, 2, 3], ["SAME", "VALID"])),
)
def test_pooling(pool: Function, kernel: Any, stride: int, padding: str) -> None:
    for height, width in ((8, 9), (7, 7)):
        assert_same_gradients(
            lambda x: pool(x, kernel, stride, padding), values(1, 2, height, width, 3)
        )


def test_the_first_of_equal_maxima_takes_all() -> None:
    ties = np.random.default_rng(1).integers(0, 3, (2, 8, 8, 3)).astype(np.float32)
    assert_same_gradients(lambda x: tf.nn.max_pool2d(x, 3, 2, "SAME"), ties)


ELEMENTWISE = [
    tf.nn.relu, tf.nn.relu6, tf.nn.leaky_relu, tf.nn.elu, tf.nn.selu, tf.nn.softplus,
    tf.nn.softsign, tf.sigmoid, tf.tanh, lambda x: tf.sqrt(x * x + 0.5),
    lambda x: tf.math.rsqrt(x * x + 0.5), lambda x: tf.math.reciprocal(x * x + 0.5),
]  # fmt: skip


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_activations_and_roots(function: Function) -> None:
    x = np.concatenate([values(1, 200) * 4, [0.0, 6.0, -0.0]])
    assert_same_gradients(function, x.astype(np.float32))


def test_the_error_function_and_its_gradient() -> None:
    x = tf.constant(np.linspace(-6, 6, 2001, dtype=np.float32))
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = erf(x)
    np.testing.assert_allclose(found, tf.math.erf(x), atol=4e-7)
    np.testing.assert_allclose(
        tape.gradient(found, x), 2 / np.sqrt(np.pi) * np.exp(-np.square(x)), atol=4e-7
    )


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(4, 5), (8, 10), (3, 13)])
def test_resizing(method: str, size: Any) -> None:
    assert_same_gradients(lambda x: tf.image.resize(x, size, method), values(1, 2, 4, 5, 3))


SLICES: list[Function] = [
    lambda x: x[1:3],
    lambda x: x[:, ::2],
    lambda x: x[:, 1::3, 2],
    lambda x: x[..., -1],
    lambda x: x[..., 1:, tf.newaxis, ::2],
    lambda x: x[0],
    lambda x: x[::-1],
    lambda x: x[:, 6:1:-2],
    lambda x: x[tf.newaxis, 2, ..., 3],
    lambda x: x[1:-1, -3:, :2],
]


@pytest.mark.parametrize("number", range(len(SLICES)))
def test_slices(number: int) -> None:
    assert_same_gradients(SLICES[number], values(1, 4, 7, 5))


def test_tensorflow_gets_its_own_gradients_back() -> None:
    entries = gradients._registry()
    before = {name: entry["type"] for name, entry in entries.items()}
    with builtin_gradients():
        assert entries["Relu"]["type"] is not before["Relu"]
    with pytest.raises(RuntimeError), builtin_gradients():
        raise RuntimeError
    assert {name: entry["type"] for name, entry in entries.items()} == before


def test_another_tensorflow_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_REGISTRY", "no_such_name")
    with pytest.raises(LocalError, match="cannot replace gradients in TensorFlow"):
        gradients._registry()
