"""Turn a Keras model into a `.task` file that trains on TensorFlow Lite's builtin kernels.

Promises a file that was checked against Keras in the runtimes installed here, or a
LocalError that names the layer, the op and what to use instead. The user's model comes
back as it went in.
"""

import hashlib
import importlib
import importlib.util
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import tensorflow as tf

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import Plan, Task, Training, decode_plan, encode_plan, encode_task
from broker_bridge.wire import weights as wire
from broker_bridge.wire.weights import TensorSpec
from server.tasks import advice
from server.tasks.graph import Graph, graph_of, unique_names
from server.tasks.objectives import Objective, objective_of
from server.tasks.optimisers import Rule, rule_of
from server.tasks.options import TaskOptions
from server.tasks.ranges import token_ranges
from server.tasks.selfcheck import Subject, check_task

__all__ = ["Built", "build_task", "export", "load_model_file", "subject_of"]


@dataclass(frozen=True)
class Built:
    """A task that was converted, and the Keras side to compare it with."""

    task: Task
    tflite: bytes
    weights: bytes
    subject: Subject

    @property
    def plan(self) -> Plan:
        """The plan as devices get it."""
        return decode_plan(encode_plan(self.task, self.tflite))


def build_task(model: Any, options: TaskOptions) -> bytes:
    """Return the bytes of the `.task` file for `model`, checked against Keras.

    Raises LocalError when the model cannot be trained on a device.
    """
    built = export(model, options)
    found = check_task(built.plan, built.subject)
    checked = {f"checked with {name.split()[0]}": name.split()[1] for name in found}
    task = msgspec.structs.replace(built.task, versions=built.task.versions | checked)
    return encode_task(task, built.tflite, built.weights)


def export(model: Any, options: TaskOptions) -> Built:
    """Convert `model` without checking the result. Raises LocalError as `build_task`."""
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
    _refuse_settings(options, objective, graph)
    tflite = _convert(graph)
    weights = wire.encode(graph.initial)
    task = _task(
        options,
        inputs,
        output,
        objective,
        rule,
        graph,
        tflite,
        weights,
        float(optimiser.learning_rate),
        token_ranges(graph.functions["infer"], len(inputs)),
    )
    return Built(task, tflite, weights, Subject(model, objective, optimiser, graph.variables))


def _refuse_settings(options: TaskOptions, objective: Objective, graph: Graph) -> None:
    for name, array in graph.initial.items():
        if not np.isfinite(array).all():
            raise LocalError(f"the model's weight {name!r} starts as NaN or infinity")
    for name in ("learning_rate", "proximal_mu", "clip_norm"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise LocalError(f"{name} is {value}: give a number from 0 up")
    classes = objective.classes
    if options.label_names and classes not in (None, len(options.label_names)):
        raise LocalError(
            f"there are {len(options.label_names)} label names, and the model tells {classes} "
            "classes apart: name each, in order"
        )


def subject_of(model: Any, options: TaskOptions, task: Task) -> Subject:
    """Return the Keras side of an existing `task`. Raises LocalError if it is another model's."""
    _, output = _interface(model)
    objective = objective_of(model, options.loss, options.metrics, output, options.label)
    names = unique_names([v.path for v in model.variables])
    variables = dict(zip(names, model.variables, strict=True))
    try:
        own = tuple(variables[spec.name] for spec in task.weights)
    except KeyError as error:
        raise LocalError(
            f"the model has no weight {error}: the task {task.name!r} is of another model"
        ) from None
    return Subject(model, objective, _optimiser(model, options), own)


def load_model_file(path: str, function: str = "model") -> tuple[Any, TaskOptions]:
    """Run a model file: return what its `function` returns, and its `options`.

    Raises LocalError naming the file.
    """
    file = Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise LocalError(f"there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    # Names and initial weights are the same in every build, unless the file draws its own.
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise LocalError(f"{path} has no function {function!r} that returns a Keras model")
        model = make()
    except LocalError:
        raise
    except Exception as error:
        raise LocalError(
            f"{path} failed: {type(error).__name__}: {advice.in_one_line(error)}"
        ) from error
    if not isinstance(model, keras.Model):
        raise LocalError(f"{path}: {function}() returned {type(model).__name__}, not a Keras model")
    return model, getattr(module, "options", TaskOptions(name=file.stem))


def _interface(model: Any) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """Return the specs of one sample's inputs and output."""
    if not model.built or not getattr(model, "inputs", None):
        raise LocalError(
            f"the model {model.name!r} has no known input: start it with keras.Input(shape), "
            "or build a functional model: x = keras.Input(shape); keras.Model(x, yours(x))"
        )
    if len(model.outputs) != 1:
        raise LocalError(f"the model has {len(model.outputs)} outputs: a task has one")
    inputs = tuple(_spec(tensor, "input") for tensor in model.inputs)
    output = _spec(model.outputs[0], "output")
    if not output.shape:
        raise LocalError(
            f"the output {output.name!r} has no axis beyond the batch, over which Keras' losses "
            "are taken: end the model with Dense(1), or keras.layers.Reshape((1,))"
        )
    return inputs, output


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


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep back what TensorFlow prints: `advice` says what matters, in one sentence."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with tempfile.TemporaryFile() as drain:
            os.dup2(drain.fileno(), 2)
            yield
            sys.stderr.flush()
    finally:
        os.dup2(terminal, 2)  # C++ writes to the descriptor, not to sys.stderr
        os.close(terminal)


def _convert(graph: Graph) -> bytes:
    with tempfile.TemporaryDirectory() as folder, _without_chatter():
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


def _operations(tflite: bytes) -> dict[str, int]:
    """Count the ops of a training step, most frequent first."""
    schema = importlib.import_module("tensorflow.lite.python.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(tflite, 0)
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    train = next(
        found.subgraphIndex for found in model.signatureDefs if found.signatureKey == b"train"
    )
    codes = [model.operatorCodes[op.opcodeIndex] for op in model.subgraphs[train].operators]
    counted = Counter(names[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in codes)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


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
    input_ranges: tuple[tuple[float, float] | None, ...],
) -> Task:
    return Task(
        name=options.name,
        description=options.description,
        licence=options.licence,
        operations=_operations(tflite),
        versions={"tensorflow": tf.__version__, "keras": keras.__version__},
        batch_size=options.batch_size,
        evaluation_batch_size=options.evaluation_batch_size,
        inputs=inputs,
        input_ranges=input_ranges if any(input_ranges) else (),
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
