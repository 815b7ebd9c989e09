"""Gradients that TensorFlow Lite's builtin kernels can compute.

TensorFlow differentiates some ops with kernels that exist nowhere else (ReluGrad,
Conv2DBackpropFilter, MaxPoolGrad …). While `builtin_gradients()` is active these ops
are differentiated by the formulas in this folder instead: the same numbers, made of
ops that tflite-runtime has.

The entries are swapped in TensorFlow's gradient registry, a private name: it is the
only way that reaches into nested functions. TensorFlow is pinned, and a change of that
name is refused in one sentence. Only one thread may trace at a time.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from broker_bridge.errors import LocalError

__all__ = ["builtin_gradients"]

Gradient = Callable[..., Any]

_REGISTRY = "_registry"  # TensorFlow's name for it


@contextmanager
def builtin_gradients() -> Iterator[None]:
    """Differentiate by builtin ops inside this block. Raises LocalError on another TensorFlow."""
    entries = _registry()
    replaced = {name: dict(entries[name]) for name in _gradients() if name in entries}
    try:
        for name, gradient in _gradients().items():
            if name in entries:
                entries[name]["type"] = gradient
        yield
    finally:
        for name, entry in replaced.items():
            entries[name].update(entry)


def _registry() -> dict[str, dict[str, Any]]:
    import tensorflow as tf

    try:
        ops = importlib.import_module("tensorflow.python.framework.ops")
        entries: dict[str, dict[str, Any]] = getattr(ops.gradient_registry, _REGISTRY)
        if callable(entries["Relu"]["type"]):
            return entries
    except (ImportError, AttributeError, KeyError, TypeError):
        pass
    raise LocalError(
        f"midge cannot replace gradients in TensorFlow {tf.__version__}: "
        "install the tested version with pip install 'midge[export]'"
    )


def _gradients() -> dict[str, Gradient]:
    from server.tasks import convolution, elementwise, pooling, reshaping

    return {
        **elementwise.GRADIENTS,
        **convolution.GRADIENTS,
        **pooling.GRADIENTS,
        **reshaping.GRADIENTS,
    }
