"""Losses and metrics: what a model is trained for, and how it is judged.

Any Keras loss that is a sum or a mean over samples works, with Keras' own arithmetic.
A metric must be a weighted mean over samples, so that devices' sums can be added;
others (AUC, precision) are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import squeeze_or_expand_to_same_rank

from broker_bridge.errors import LocalError
from broker_bridge.wire.weights import TensorSpec

__all__ = ["Objective", "objective_of"]

Values = Callable[[Any, Any], Any]

_INTEGER_LOSSES = ("SparseCategoricalCrossentropy", "sparse_categorical_crossentropy")
_SHARE_LOSSES = (
    "BinaryCrossentropy",
    "binary_crossentropy",
    "BinaryFocalCrossentropy",
    "binary_focal_crossentropy",
    "CategoricalCrossentropy",
    "categorical_crossentropy",
    "CategoricalFocalCrossentropy",
    "categorical_focal_crossentropy",
)


@dataclass(frozen=True)
class Objective:
    """What to minimise and what to measure; `label` and `label_range` follow from the loss."""

    name: str
    loss: Any
    metrics: tuple[tuple[str, Values], ...]
    label: TensorSpec
    label_range: tuple[float, float] | None

    @property
    def classes(self) -> int | None:
        """How many classes integer labels number; None if the labels are no class numbers."""
        if self.label.dtype == "float32" or self.label_range is None:
            return None
        return int(self.label_range[1]) + 1

    def batch_loss(self, y: Any, output: Any, sample_weight: Any, present: Any) -> Any:
        """Return what Keras would minimise for the batch's real rows."""
        sample_weight = self.row_weights(y, output, sample_weight)
        mask = getattr(output, "_keras_mask", None)
        reduction = self.loss.reduction
        if mask is not None:
            row = tf.reshape(present, [-1] + [1] * (mask.shape.rank - 1))
            output._keras_mask = tf.logical_and(tf.cast(mask, tf.bool), tf.cast(row, tf.bool))
        elif reduction in ("sum_over_batch_size", "mean"):
            # Keras divides by the rows of the batch; only some of them are real.
            sample_weight = sample_weight * (present.shape[0] / tf.reduce_sum(present))
        return self.loss(y, output, sample_weight=sample_weight)

    def row_weights(self, y: Any, output: Any, sample_weight: Any) -> Any:
        """Return `sample_weight` [batch] as [batch, 1, …], of the rank of the loss' values.

        Keras takes [batch] for [batch, steps] only by accident, where both are equal.
        """
        rank = len(self.loss.call(y, output).shape)
        return tf.reshape(sample_weight, [-1] + [1] * (rank - 1))

    def sums(self, y: Any, output: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Return Σ weight·value and Σ weight, for the loss and then each metric: [1 + metrics]."""
        mask = getattr(output, "_keras_mask", None)
        functions = [self.loss.call, *(values for _, values in self.metrics)]
        pairs = [_weighted(values(y, output), sample_weight, mask) for values in functions]
        return tf.stack([total for total, _ in pairs]), tf.stack([count for _, count in pairs])


def objective_of(
    model: Any, loss: Any, metrics: Any, output: TensorSpec, label: TensorSpec | None
) -> Objective:
    """Return the objective of `model`: as named here, else as it was compiled.

    Raises LocalError, naming the loss or metric, for what cannot be trained on devices.
    """
    found = _loss_of(model, loss)
    name = _name_of(found)
    integers = _is_one_of(found, _INTEGER_LOSSES)
    if label is None:
        shape = output.shape[:-1] if integers else output.shape
        label = TensorSpec("y", "int32" if integers else "float32", shape)
    if metrics is None:
        metrics = _metrics_of(model)
    _refuse_misfit(found, name, label, output)
    named = tuple(_metric(metric, label, output) for metric in metrics)
    return Objective(name, found, named, label, _label_range(found, integers, output))


def _refuse_misfit(loss: Any, name: str, label: TensorSpec, output: TensorSpec) -> None:
    def values(y: Any, out: Any) -> Any:
        return loss.call(y, out)

    specs = (tf.TensorSpec([2, *spec.shape], spec.dtype) for spec in (label, output))
    try:
        tf.function(values, autograph=False).get_concrete_function(*specs)
    except Exception as error:
        raise LocalError(
            f"the loss {name} does not fit the model's output {list(output.shape)} and labels of "
            f"{label.dtype}{list(label.shape)}: {str(error).strip().splitlines()[-1].strip()}; "
            "say what one sample's label is with TaskOptions(label=TensorSpec(…))"
        ) from error


def _label_range(loss: Any, integers: bool, output: TensorSpec) -> tuple[float, float] | None:
    if integers:
        ignored = getattr(loss, "ignore_class", None)
        return float(min(0, 0 if ignored is None else ignored)), float(output.shape[-1] - 1)
    return (0.0, 1.0) if _is_one_of(loss, _SHARE_LOSSES) else None


def _loss_of(model: Any, loss: Any) -> Any:
    if loss is None:
        compiled = getattr(model, "_compile_loss", None)
        loss = _only(compiled._user_loss) if compiled is not None else None
        _refuse_loss_weight(compiled)
    if loss is None:
        raise LocalError("the model has no loss: compile it with one, or name one with --loss")
    if isinstance(loss, list | tuple | dict):
        raise LocalError("the model has several losses: a task has one output and one loss")
    try:
        found = keras.losses.get(loss)
    except ValueError as error:
        raise LocalError(f"there is no loss {loss!r}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, keras.losses.Loss):
        name = getattr(found, "__name__", "loss").strip("<>")  # of a lambda, too
        found = keras.src.losses.losses.LossFunctionWrapper(found, name=name)
    if found.reduction in (None, "none"):
        raise LocalError(
            f"the loss {_name_of(found)} has no reduction: use sum_over_batch_size, "
            "and weight samples with sample_weight"
        )
    return found


def _refuse_loss_weight(compiled: Any) -> None:
    weight = _only(getattr(compiled, "_user_loss_weights", None))
    if weight not in (None, 1, 1.0):
        raise LocalError(
            f"the loss is compiled with loss_weights={weight}: a task has one loss; multiply "
            "inside a loss of your own, or change the learning rate"
        )


def _metrics_of(model: Any) -> list[Any]:
    """Return what `model` was compiled to measure; all of it counts by sample weight here."""
    compiled = getattr(model, "_compile_metrics", None)
    if compiled is None:
        return []
    found: list[Any] = []
    for group in (_only(compiled._user_metrics), _only(compiled._user_weighted_metrics)):
        if group is not None:
            found += group if isinstance(group, list | tuple) else [group]
    return found


def _only(named: Any) -> Any:
    """Return what is named for a model's one output, by its name or its place."""
    while isinstance(named, list | tuple | dict) and len(named) == 1:
        named = next(iter(named.values() if isinstance(named, dict) else named))
    return named


def _name_of(loss: Any) -> str:
    function = getattr(loss, "fn", None)
    return str(getattr(function, "__name__", None) or loss.name)


def _is_one_of(loss: Any, names: tuple[str, ...]) -> bool:
    return type(loss).__name__ in names or _name_of(loss) in names


def _metric(metric: Any, label: TensorSpec, output: TensorSpec) -> tuple[str, Values]:
    """Return the metric's name, and the function from (y, output) to a value for each sample."""
    if isinstance(metric, str) and metric.lower() in ("accuracy", "acc"):
        return metric, _accuracy(label, output)
    try:
        found = keras.metrics.get(metric)
    except ValueError as error:
        raise LocalError(f"there is no metric {metric!r}: {str(error).splitlines()[0]}") from None
    name = metric if isinstance(metric, str) else getattr(found, "name", None) or found.__name__
    if type(found).__name__ in ("SparseTopKCategoricalAccuracy", "TopKCategoricalAccuracy"):
        return name, _top_k(found._fn_kwargs["k"], sparse=label.dtype != "float32")
    function = getattr(found, "__name__", "")
    if function in ("sparse_top_k_categorical_accuracy", "top_k_categorical_accuracy"):
        return name, _top_k(5, sparse=function.startswith("sparse"))
    if isinstance(found, keras.metrics.MeanMetricWrapper):
        options = found._fn_kwargs or {}
        return name, lambda y, output: found._fn(y, output, **options)
    if isinstance(found, keras.metrics.Metric):
        raise LocalError(
            f"the metric {name!r} is not a mean over samples, so devices' results cannot be "
            "added: use a function of (y_true, y_pred) that gives one value for each sample"
        )
    return name, found


def _accuracy(label: TensorSpec, output: TensorSpec) -> Values:
    if label.dtype != "float32":
        functions = keras.metrics.sparse_categorical_accuracy
    elif output.shape[-1:] in ((), (1,)):
        functions = keras.metrics.binary_accuracy
    else:
        functions = keras.metrics.categorical_accuracy
    return functions  # type: ignore[no-any-return]


def _top_k(k: int, *, sparse: bool) -> Values:
    """A label is among the top k if fewer than k outputs are larger (in_top_k does not lower)."""

    def values(y: Any, output: Any) -> Any:
        classes = output.shape[-1]
        index = tf.cast(y, tf.int32) if sparse else tf.argmax(y, -1, tf.int32)
        if index.shape.rank == output.shape.rank:
            index = tf.squeeze(index, -1)
        own = tf.reduce_sum(tf.one_hot(index, classes) * output, -1, keepdims=True)
        larger = tf.reduce_sum(tf.cast(output > own, tf.float32), -1)
        return tf.cast(larger < float(k), tf.float32)

    return values


def _weighted(values: Any, sample_weight: Any, mask: Any) -> tuple[Any, Any]:
    values = tf.cast(values, tf.float32)
    weight = tf.reshape(sample_weight, [-1] + [1] * (len(values.shape) - 1))
    weight = weight * tf.ones_like(values)
    if mask is not None:
        weight, mask = squeeze_or_expand_to_same_rank(weight, tf.cast(mask, tf.float32))
        weight = weight * mask
    return tf.reduce_sum(values * weight), tf.reduce_sum(weight)
