"""Refusals: which layer and op a device cannot run, and what to use instead."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from broker_bridge.errors import LocalError, MidgeError
from server.tasks.tracing import all_layers

__all__ = ["explain", "in_one_line", "naming_the_layer", "refuse_layers", "refuse_losses_from_data"]

_OPS = {
    "Erf": "use gelu with approximate=True",
    "Erfc": "use gelu with approximate=True",
    "Conv3DBackpropFilterV2": "use Conv2D on slices, or TimeDistributed(Conv2D)",
    "MaxPool3DGrad": "use strided convolutions, or AveragePooling over slices",
    "MaxPool3D": "use strided convolutions, or pooling over slices",
}
_FLOAT_TYPES = ("float32", "bool", "int32")


def refuse_layers(model: Any) -> None:
    """Raise LocalError for a layer known not to work, before tracing finds out obscurely."""
    _refuse_own_training(model)
    for layer in all_layers(model):
        name = f"the layer {layer.name!r} ({type(layer).__name__})"
        if getattr(layer, "stateful", False):
            raise LocalError(f"{name} is stateful: samples are shuffled; use stateful=False")
        if getattr(layer, "data_format", None) == "channels_first":
            raise LocalError(f"{name} is channels_first: devices compute channels_last")
        policy = keras.backend.standardize_dtype(layer.compute_dtype or "float32")
        if policy in ("string", "int64"):
            raise LocalError(
                f"{name} looks values up ({policy}): do that where samples are made, and give "
                "the model the numbers (int32)"
            )
        if policy not in _FLOAT_TYPES:
            raise LocalError(
                f"{name} computes in {policy}: devices compute in float32; build the model with "
                "keras.config.set_dtype_policy('float32')"
            )


def _refuse_own_training(model: Any) -> None:
    """A step of the user's own would be left out without a word."""
    for name in ("train_step", "compute_loss"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise LocalError(
                f"the model {model.name!r} has a {name} of its own ({type(model).__name__}), which "
                "devices do not run: put what it adds into the loss or into a layer"
            )
    if not model.trainable_variables and model.built:
        raise LocalError(
            f"the model {model.name!r} has nothing to train: set trainable = True on a layer"
        )


def refuse_losses_from_data(model: Any, penalties: list[Any], inputs: list[Any]) -> None:
    """Raise LocalError for an add_loss over the batch: it counts rows that only fill it up."""
    if any(layer.activity_regularizer is not None for layer in all_layers(model)):
        return  # these are made from the data as well, and leave such rows out
    for penalty in penalties:
        if _depends(penalty, {tensor.op.name for tensor in inputs}):
            place = penalty.op.name.rpartition("/")[0] or model.name
            raise LocalError(
                f"the layer {place!r} makes a loss from the data (add_loss), which would count the "
                "rows that fill up a short batch: give it out as part of the model's output, and "
                "count it in a loss function of your own"
            )


def _depends(tensor: Any, on: set[str]) -> bool:
    """Whether `tensor` is computed from one of the ops named `on`."""
    seen: set[str] = set()
    waiting = [tensor.op]
    while waiting:
        op = waiting.pop()
        if op.name in on:
            return True
        if op.name not in seen:
            seen.add(op.name)
            waiting += [source.op for source in op.inputs]
    return False


@contextmanager
def naming_the_layer(model: Any) -> Iterator[None]:
    """Turn an error of tracing into a LocalError that says where it happened."""
    try:
        yield
    except MidgeError:
        raise
    except Exception as error:
        raise LocalError(
            f"the model {model.name!r} cannot be traced{_place(error)}: {_reason(error)}"
        ) from error


def in_one_line(error: Exception) -> str:
    """Return what the error says, and in which layer, without Keras' list of arguments."""
    return _reason(error) + _place(error)


def _place(error: Exception) -> str:
    """Return the layer that Keras or TensorFlow names in their long messages."""
    found = re.search(r"when calling (?:layer )?'?([\w.]+)'?", str(error))
    return f", in {found[1].removesuffix('.call')}" if found else ""


def _reason(error: Exception) -> str:
    """Return the one line that says what is wrong."""
    plain = re.sub(r"\x1b\[\d+m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"\w*(Error|Exception): ", line)]
    if named:
        return named[-1].split(": ", 1)[1]
    told = [line for line in lines if not line.startswith(("in user code", "File ", "Exception"))]
    first, *more = told or lines or [type(error).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first


def explain(error: Exception, graph: Any) -> LocalError:
    """Return the sentence for a failed conversion."""
    text = str(error)
    ops = sorted(set(re.findall(r"tf\.(\w+)", text)) & _op_types(graph))
    if not ops:
        place = re.search(r'\["\w+:", "([^"@]+)', text)
        told = re.search(r"'tfl?\.\w+' op [^\n]*", text)
        return LocalError(
            f"the model cannot run on a device{f', in {place[1]}' if place else ''}: "
            f"{told[0] if told else text.splitlines()[0]}; write it with ops that TensorFlow "
            "Lite has"
        )
    parts = []
    for op in ops:
        layer = _layer_of(op, graph)
        advice = _OPS.get(op, "write it with ops that TensorFlow Lite has")
        parts.append(f"{op}{f' in {layer}' if layer else ''} has no builtin kernel: {advice}")
    return LocalError("the model cannot run on a device; " + "; ".join(parts))


def _op_types(graph: Any) -> set[str]:
    return {op.type for f in graph.functions.values() for op in f.graph.get_operations()}


def _layer_of(kind: str, graph: Any) -> str:
    for function in graph.functions.values():
        for op in function.graph.get_operations():
            if op.type == kind:
                return str(op.name.rsplit("/", 1)[0])
    return ""
