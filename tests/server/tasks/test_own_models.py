"""Models as people bring them: what compile() and a layer say counts, or is refused by name."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from server.tasks import worker
from server.tasks.checks import random_steps
from server.tasks.exporter import export
from server.tasks.options import TaskOptions
from server.tasks.selfcheck import check_task
from tests.server.tasks.compare import classifier, compare

OPTIONS = TaskOptions(name="own", batch_size=4, evaluation_batch_size=8)


def on_both_sides(model: Any, steps: int = 4) -> list[tuple[Any, Any]]:
    """Return (device's, Keras') weights after the same steps of plain `train_on_batch`."""
    built = export(model, OPTIONS)
    start = {
        spec.name: v.numpy()
        for spec, v in zip(built.task.weights, built.subject.variables, strict=True)
    }
    batches = random_steps(built.task, steps)
    found = worker.train(TaskRuntime(built.plan), start, batches, built.task.defaults)
    for step in batches:
        model.train_on_batch(step.inputs[0], step.labels, sample_weight=step.weights)
    return [(found[f"w{i}"], v.numpy()) for i, v in enumerate(built.subject.variables)]


def dense(*layers: Any, kind: Any = keras.Model, **compiled: Any) -> Any:
    keras.utils.set_random_seed(3)
    inputs = outputs = keras.Input((5,), name="x")
    for layer in (*layers, L.Dense(2, name="head")):
        outputs = layer(outputs)
    model = kind(inputs, outputs)
    model.compile(**({"optimizer": keras.optimizers.SGD(0.3), "loss": "mse"} | compiled))
    return model


def decayed_but_for_biases() -> Any:
    optimiser = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimiser.exclude_from_weight_decay(var_names=["bias"])
    return dense(L.Dense(4, bias_initializer="ones"), optimizer=optimiser)


LIKE_FIT: dict[str, Callable[[], Any]] = {
    "a bound on the norm": lambda: dense(
        L.Dense(4, kernel_constraint=keras.constraints.MaxNorm(1.0))
    ),
    "weights that stay positive": lambda: dense(L.Dense(4, kernel_constraint="non_neg")),
    "biases that do not decay": decayed_but_for_biases,
    "a penalty on what a layer gives out": lambda: dense(L.Dense(4, activity_regularizer="l1")),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_FIT)
def test_what_a_layer_or_optimiser_asks_of_its_weights_holds_on_the_device(name: str) -> None:
    for value, wanted in on_both_sides(LIKE_FIT[name]()):
        np.testing.assert_allclose(value, wanted, atol=1e-6)


def test_a_penalty_on_outputs_counts_real_rows_only_in_training_and_evaluation() -> None:
    model = dense(L.Dense(4, activity_regularizer="l2"), L.Dropout(0.2))
    found = compare(model, runtimes=["tflite-runtime"], steps=5, options=OPTIONS)
    assert max(found["tflite-runtime"].values()) < 1e-6


def test_metrics_and_loss_named_for_the_one_output_are_its_own() -> None:
    model = dense(loss={"head": "mse"}, metrics={"head": ["mae"]}, weighted_metrics=["mse"])
    assert export(model, OPTIONS).task.metrics == ("mae", "mse")
    assert export(dense(loss=["mse"], metrics=[["mae"]]), OPTIONS).task.loss == "mean_squared_error"


class OwnStep(keras.Model):  # type: ignore[misc]
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


class OwnLoss(keras.Model):  # type: ignore[misc]
    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        return 5 * super().compute_loss(*arguments, **named)


class Divergence(L.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.mean(x * x))
        return x


def frozen() -> Any:
    model = dense()
    model.trainable = False
    return model


def of_text() -> Any:
    inputs = keras.Input((1,), dtype="string")
    words = L.StringLookup(vocabulary=["a", "b"], name="words")(inputs)
    return classifier(inputs, L.Dense(3)(L.Flatten()(L.Embedding(4, 3)(words))))


def squeezed() -> Any:
    inputs = keras.Input((5,))
    outputs = keras.ops.squeeze(L.Dense(1)(inputs), -1)
    return classifier(inputs, outputs, loss="mse")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a training step": (lambda: dense(kind=OwnStep), r"has a train_step of its own \(OwnStep\)"),
    "a loss in the model": (lambda: dense(kind=OwnLoss), r"has a compute_loss of its own"),
    "a weight of the loss": (lambda: dense(loss_weights=[0.1]), r"loss_weights=0\.1: a task has"),
    "a loss made from data": (lambda: dense(Divergence(name="kl")), "kl.*add_loss.*short batch"),
    "nothing trains": (frozen, "nothing to train: set trainable = True"),
    "text": (of_text, r"'words' \(StringLookup\) looks values up \(string\): do that"),
    "a single value": (squeezed, r"no axis beyond the batch.*end the model with Dense\(1\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_otherwise_than_in_keras_is_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(LocalError, match=sentence):
        export(make(), OPTIONS)


def test_an_op_that_conversion_itself_makes_is_refused_in_one_sentence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = dense(L.SpectralNormalization(L.Dense(4), name="spectral"))
    with pytest.raises(
        LocalError, match=r"cannot run on a device, in .*spectral.*Optional"
    ) as said:
        export(model, OPTIONS)
    assert "\n" not in str(said.value)
    assert "error:" not in capfd.readouterr().err


def test_keras_half_of_the_check_runs_without_the_kernel_that_corrupts_memory() -> None:
    code = (
        "from pathlib import Path; import sys; from server.tasks.cli import _load; "
        "_load(Path(sys.argv[1]), 'model'); import tensorflow as tf; "
        "from tensorflow.python.util import _pywrap_util_port as port; "
        "print(port.IsMklEnabled())"
    )
    left = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, "examples/digits/model.py"],
        capture_output=True, text=True, check=True, env=left,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [(1.0, "please report this model"), (1e6, "Keras itself comes out .* one rounding off")],
)
def test_a_difference_that_any_two_sides_would_have_is_told_from_a_fault(scale, sentence):
    """A fresh MobileNetV2 on random samples is of the second kind: nobody can reproduce it."""

    def model(factor):
        return dense(L.Dense(4), L.Lambda(lambda x: keras.ops.sin(x * factor)))

    made, other = (export(model(scale * factor), OPTIONS) for factor in (1.0, 1.5))
    with pytest.raises(LocalError, match=sentence):
        check_task(made.plan, other.subject)
