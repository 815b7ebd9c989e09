"""Losses and metrics: as in Keras, with sample weights and a short last batch."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.wire.weights import TensorSpec
from server.tasks.exporter import Built, export
from server.tasks.options import TaskOptions
from tests.server.tasks.compare import classifier, compare

OPTIONS = TaskOptions(name="small", batch_size=4, evaluation_batch_size=4)
TOLERANCE = 1e-6
losses = keras.losses

LOSSES: dict[str, tuple[Any, str | None]] = {
    "sparse categorical, logits": (losses.SparseCategoricalCrossentropy(from_logits=True), None),
    "sparse categorical, probabilities": ("sparse_categorical_crossentropy", "softmax"),
    "sparse categorical, a class ignored": (
        losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1), None
    ),
    "categorical, logits": (losses.CategoricalCrossentropy(from_logits=True), None),
    "categorical, probabilities": ("categorical_crossentropy", "softmax"),
    "categorical, smoothed": (
        losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), None
    ),
    "binary, logits": (losses.BinaryCrossentropy(from_logits=True), None),
    "binary, probabilities": ("binary_crossentropy", "sigmoid"),
    "binary focal": ("binary_focal_crossentropy", "sigmoid"),
    "categorical focal": ("categorical_focal_crossentropy", "softmax"),
    "mean squared error": ("mse", None),
    "mean absolute error": ("mae", None),
    "mean squared logarithmic error": ("msle", "softplus"),
    "Huber": (losses.Huber(0.5), None),
    "log cosh": ("log_cosh", None),
    "cosine": (losses.CosineSimilarity(), None),
    "hinge": ("hinge", None),
    "squared hinge": ("squared_hinge", None),
    "categorical hinge": ("categorical_hinge", None),
    "Kullback-Leibler": ("kl_divergence", "softmax"),
    "Poisson": ("poisson", "softplus"),
    "summed": (losses.MeanSquaredError(reduction="sum"), None),
    "mean by sample weight": (
        losses.MeanSquaredError(reduction="mean_with_sample_weight"), None
    ),
    "a function of the user's own": (
        lambda y, p: keras.ops.mean(keras.ops.square(y - p) * 0.5, axis=-1), None
    ),
}  # fmt: skip


def small(loss: Any, activation: str | None = None, **options: Any) -> Any:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    hidden = L.Dense(6, activation="tanh")(inputs)
    return classifier(inputs, L.Dense(3, activation=activation)(hidden), loss=loss, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_trains_as_in_keras(name: str) -> None:
    loss, activation = LOSSES[name]
    for found in compare(small(loss, activation), runtimes=["tflite-runtime"]).values():
        assert max(found.values()) < TOLERANCE


def test_mean_absolute_percentage_error_trains_as_in_keras() -> None:
    # Its values are in the hundreds: relative to them the difference is float rounding.
    for found in compare(small("mape"), steps=5, runtimes=["tflite-runtime"]).values():
        assert max(found.values()) < 1e-5


def test_a_label_for_each_step_of_a_sequence_trains_as_in_keras() -> None:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,), dtype="int32")
    x = L.GRU(4, return_sequences=True)(L.Embedding(9, 4, mask_zero=True)(inputs))
    model = classifier(inputs, L.Dense(9)(x), metrics=["accuracy"])
    for found in compare(model).values():
        assert max(found.values()) < TOLERANCE


METRICS: dict[str, tuple[Any, Any, str | None]] = {
    "accuracy, integer labels": ("accuracy", losses.SparseCategoricalCrossentropy(True), None),
    "accuracy, shares": ("accuracy", losses.CategoricalCrossentropy(True), None),
    "top 2": (keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"),
              losses.SparseCategoricalCrossentropy(True), None),
    "top 2, shares": (keras.metrics.TopKCategoricalAccuracy(2),
                      losses.CategoricalCrossentropy(True), None),
    "mean absolute error": ("mae", "mse", None),
    "mean squared error": (keras.metrics.MeanSquaredError(), "mae", None),
    "the user's own": (lambda y, p: keras.ops.max(keras.ops.abs(y - p), axis=-1), "mse", None),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_the_metric_is_what_keras_measures(name: str) -> None:
    metric, loss, activation = METRICS[name]
    model = small(loss, activation, metrics=[metric])
    draw = np.random.default_rng(0)
    x = draw.normal(size=(10, 5)).astype(np.float32)
    integers = export(model, OPTIONS).task.label.dtype == "int32"
    y = draw.integers(0, 3, 10) if integers else np.eye(3)[draw.integers(0, 3, 10)]
    weight = draw.uniform(0.5, 2.0, 10).astype(np.float32)
    built = export(model, OPTIONS)
    found = evaluated(built, Samples((x,), y.astype(built.task.label.dtype), weight))
    model.compile(loss=model.loss, weighted_metrics=[metric])
    expected = model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    del expected["loss"]  # Keras divides it by rows, not by their weights
    assert list(found.metrics.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def test_binary_accuracy_is_chosen_for_one_output() -> None:
    inputs = keras.Input((5,))
    model = classifier(
        inputs, L.Dense(1, activation="sigmoid")(inputs), loss="binary_crossentropy",
        metrics=["accuracy"],
    )  # fmt: skip
    built = export(model, OPTIONS)
    assert built.task.label == TensorSpec("y", "float32", (1,))
    assert built.task.label_range == (0.0, 1.0)
    x = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    y = (x[:, :1] > 0).astype(np.float32)
    found = evaluated(built, Samples((x,), y)).metrics["accuracy"]
    assert found == pytest.approx(model.evaluate(x, y, verbose=0)[1])


def evaluated(built: Built, samples: Samples) -> Any:
    weights = {
        spec.name: v.numpy()
        for spec, v in zip(built.task.weights, built.subject.variables, strict=True)
    }
    return TaskRuntime(built.plan).evaluate(weights, samples)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no loss": (lambda: small(None), "has no loss"),
    "unknown loss": (lambda: small("entropy of the universe"), "no loss|Could not interpret"),
    "no reduction": (lambda: small(losses.MeanSquaredError(reduction=None)), "has no reduction"),
    "AUC": (lambda: small("mse", metrics=[keras.metrics.AUC(name="auc")]),
            "metric 'auc' is not a mean over samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_or_added_is_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    options = OPTIONS
    if name == "unknown loss":
        make, options = lambda: small("mse"), TaskOptions(name="s", loss="entropy")
        sentence = "there is no loss 'entropy'"
    elif name == "no loss":

        def make() -> Any:
            inputs = keras.Input((5,))
            return keras.Model(inputs, L.Dense(3)(inputs))

    with pytest.raises(LocalError, match=sentence):
        export(make(), options)


def test_an_output_that_does_not_fit_its_loss_is_refused() -> None:
    inputs = keras.Input((5,))
    model = classifier(inputs, L.Dense(3)(inputs), loss="mse")
    label = TensorSpec("y", "float32", (4,))
    with pytest.raises(LocalError, match="the loss mean_squared_error does not fit"):
        export(model, TaskOptions(name="s", label=label))


def test_labels_outside_the_range_are_known_before_training() -> None:
    for name, low in (("logits", 0), ("a class ignored", -1)):
        loss, _ = LOSSES[f"sparse categorical, {name}"]
        assert export(small(loss), OPTIONS).task.label_range == (low, 2)
