"""Update rules: as Keras' optimisers, with their state in and out of the graph."""

from typing import Any

import keras
import pytest
from keras import layers as L  # noqa: N812

from broker_bridge.errors import LocalError
from server.tasks.exporter import export
from server.tasks.options import TaskOptions
from tests.server.tasks.compare import classifier, compare

O = keras.optimizers  # noqa: E741

OPTIMISERS = {
    "SGD": (lambda: O.SGD(0.05), 20, 1e-6),
    "momentum": (lambda: O.SGD(0.02, momentum=0.9), 20, 1e-6),
    "Nesterov": (lambda: O.SGD(0.02, momentum=0.9, nesterov=True), 20, 1e-6),
    "SGD, weight decay": (lambda: O.SGD(0.05, weight_decay=0.01), 20, 1e-6),
    "Adam": (lambda: O.Adam(0.002), 5, 2e-6),
    "Adam, AMSGrad": (lambda: O.Adam(0.002, amsgrad=True), 5, 2e-6),
    "AdamW": (lambda: O.AdamW(0.002, weight_decay=0.01), 5, 2e-6),
    "RMSprop": (lambda: O.RMSprop(0.002), 5, 2e-6),
    "RMSprop, centred, momentum": (
        lambda: O.RMSprop(0.002, momentum=0.5, centered=True), 5, 2e-6
    ),
    "Adagrad": (lambda: O.Adagrad(0.02), 5, 1e-6),
}  # fmt: skip


def network(optimiser: Any) -> Any:
    keras.utils.set_random_seed(5)
    inputs = keras.Input((5,))
    hidden = L.Dense(8, activation="tanh")(inputs)
    return classifier(inputs, L.Dense(3)(hidden), optimiser=optimiser)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_optimiser_trains_as_in_keras(name: str) -> None:
    make, steps, tolerance = OPTIMISERS[name]
    for found in compare(network(make()), steps=steps).values():
        assert max(found.values()) < tolerance


def test_the_proximal_term_and_the_clip_are_as_in_keras() -> None:
    found = compare(network(O.SGD(0.5)), proximal_mu=0.3, clip_norm=0.2)
    assert all(max(values.values()) < 1e-6 for values in found.values())


def test_a_global_clip_of_the_optimiser_becomes_the_tasks_default() -> None:
    task = export(network(O.SGD(0.1, global_clipnorm=2.5)), TaskOptions(name="s")).task
    assert task.defaults.clip_norm == 2.5
    assert task.defaults.learning_rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: O.Ftrl(), "Ftrl is not supported on devices: use one of SGD, Adam"),
        (lambda: O.SGD(O.schedules.ExponentialDecay(0.1, 10, 0.9)), "is a schedule: give a number"),
        (lambda: O.SGD(0.1, clipvalue=1.0), "clipvalue is not supported.*use global_clipnorm"),
        (lambda: O.SGD(0.1, clipnorm=1.0), "clipnorm is not supported.*use global_clipnorm"),
        (lambda: O.Adam(use_ema=True), "use_ema is not supported"),
    ],
)
def test_what_a_device_cannot_follow_is_refused_with_advice(make: Any, sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        export(network(make()), TaskOptions(name="s"))


def test_an_uncompiled_model_names_its_optimiser_and_loss_by_options() -> None:
    inputs = keras.Input((5,))
    model = keras.Model(inputs, L.Dense(3)(inputs))
    options = TaskOptions(name="s", loss="mse", optimiser="adam", metrics=("mae",))
    task = export(model, options).task
    assert (task.loss, task.optimiser, task.metrics) == ("mean_squared_error", "adam", ("mae",))
    with pytest.raises(LocalError, match="no optimiser"):
        export(model, TaskOptions(name="s", loss="mse"))
