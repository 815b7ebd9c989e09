"""Turn a Keras model into a `.task` file that trains on TensorFlow Lite's builtin kernels.

Promises a file that was checked against Keras in the runtimes installed here, or a
LocalError that names the layer, the op and what to use instead. The user's model comes
back as it went in.
"""

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Task, Training, encode_task
from broker_bridge.wire import weights as wire
from broker_bridge.wire.weights import TensorSpec
from server.tasks import advice
from server.tasks.graph import Graph, graph_of
from server.tasks.objectives import Objective, objective_of
from server.tasks.optimisers import Rule, rule_of
from server.tasks.options import TaskOptions

__all__ = ["build_task", "load_model_file"]


def build_task(model: Any, options: TaskOptions) -> bytes:
    """Return the bytes of the `.task` file for `model`.

    Raises LocalError when the model cannot be trained on a device.
    """
    advice.refuse_layers(model)
    inputs, output = _interface(model)
    objective = objective_of(model, options.loss, options.metrics, output, options.label)
    optimiser = _optimiser(model, options)
    rule = rule_of(optimiser)
    with advice.naming_the_layer(model):
        graph = graph_of(
            model,
            objective,
            rule,
            inputs,
            batch_size=options.batch_size,
            evaluation_batch_size=options.evaluation_batch_size,
        )
    tflite = _convert(graph)
    weights = wire.encode(graph.initial)
    task = _task(options, inputs, output, objective, rule, graph, tflite, weights,
                 float(optimiser.learning_rate))
    return encode_task(task, tflite, weights)


def load_model_file(path: str, function: str = "model") -> tuple[Any, TaskOptions]:
    """Run a model file: return what its `function` returns, and its `options`.

    Raises LocalError naming the file.
    """
    file = Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise LocalError(f"there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    keras.backend.clear_session()   # so that names are the same in every build
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise LocalError(f"{path} has no function {function!r} that returns a Keras model")
        model = make()
    except LocalError:
        raise
    except Exception as error:
        raise LocalError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, keras.Model):
        raise LocalError(f"{path}: {function}() returned {type(model).__name__}, not a Keras model")
    return model, getattr(module, "options", TaskOptions(name=file.stem))


def _interface(model: Any) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """Return the specs of one sample's inputs and output."""
    if not model.built or not getattr(model, "inputs", None):
        raise LocalError(
            f"the model {model.name!r} has no known input: start it with keras.Input(shape), "
            "or build a functional model"
        )
    if len(model.outputs) != 1:
        raise LocalError(f"the model has {len(model.outputs)} outputs: a task has one")
    inputs = tuple(_spec(tensor, "input") for tensor in model.inputs)
    return inputs, _spec(model.outputs[0], "output")


def _spec(tensor: Any, what: str) -> TensorSpec:
    name, shape = tensor.name, tensor.shape[1:]
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if None in shape:
        raise LocalError(
            f"the {what} {name!r} has the open shape {list(tensor.shape)}: only the batch may be "
            "open; give the model a fixed size"
        )
    if dtype not in ("float32", "int32", "int64", "uint8", "bool"):
        raise LocalError(
            f"the {what} {name!r} is {dtype}: devices compute in float32; build the model with "
            "dtype='float32'"
        )
    return TensorSpec(name, dtype, tuple(shape))


def _optimiser(model: Any, options: TaskOptions) -> Any:
    found = options.optimiser or getattr(model, "optimizer", None)
    if found is None:
        raise LocalError("the model has no optimiser: compile it with one, or name --optimiser")
    try:
        return keras.optimizers.get(found)
    except ValueError as error:
        raise LocalError(f"no optimiser {found!r}: {str(error).splitlines()[0]}") from None


def _convert(graph: Graph) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(
            tf.Module(),
            folder,
            signatures=graph.functions,
            # Custom gradients have done their work; saving them fails.
            options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
        )
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=list(graph.functions)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        try:
            return bytes(converter.convert())
        except Exception as error:
            raise advice.explain(error, graph) from error


def _task(
    options: TaskOptions,
    inputs: tuple[TensorSpec, ...],
    output: TensorSpec,
    objective: Objective,
    rule: Rule,
    graph: Graph,
    tflite: bytes,
    weights: bytes,
    learning_rate: float,
) -> Task:
    return Task(
        name=options.name,
        description=options.description,
        licence=options.licence,
        versions={"tensorflow": tf.__version__, "keras": keras.__version__},
        batch_size=options.batch_size,
        evaluation_batch_size=options.evaluation_batch_size,
        inputs=inputs,
        label=objective.label,
        label_range=objective.label_range,
        label_names=options.label_names,
        output=output,
        weights=graph.weights,
        trainable_count=graph.trainable_count,
        noise=graph.noise,
        optimiser=rule.name,
        optimiser_state=graph.slots,
        keep_optimiser_state=options.keep_optimiser_state,
        loss=objective.name,
        metrics=tuple(name for name, _ in objective.metrics),
        preprocessing=options.preprocessing,
        defaults=Training(
            epochs=options.epochs,
            learning_rate=learning_rate if options.learning_rate is None else options.learning_rate,
            proximal_mu=options.proximal_mu,
            clip_norm=rule.clip_norm if options.clip_norm is None else options.clip_norm,
        ),
        tflite_digest=hashlib.sha256(tflite).hexdigest(),
        tflite_bytes=len(tflite),
        weights_digest=hashlib.sha256(weights).hexdigest(),
        weights_bytes=len(weights),
    )
