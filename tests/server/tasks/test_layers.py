"""Every layer and form in the catalogue trains as in Keras, on every runtime installed here."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L  # noqa: N812

from broker_bridge.errors import LocalError
from server.tasks.exporter import export
from server.tasks.options import TaskOptions
from tests.server.tasks.catalogue import STEPS, groups, side_by_side
from tests.server.tasks.compare import classifier, compare

TOLERANCE = 1e-6
OPTIONS = TaskOptions(name="small", batch_size=4, evaluation_batch_size=4)


@pytest.mark.parametrize(
    ("kind", "names"), groups(), ids=[f"{kind}: {', '.join(names)}" for kind, names in groups()]
)
def test_layers_train_as_in_keras(kind: str, names: list[str]) -> None:
    inputs, outputs, _ = side_by_side(kind, names)
    steps = min(STEPS.get(name, 20) for name in names)
    for runtime, found in compare(classifier(inputs, outputs), steps=steps).items():
        # Weights and losses step by step; the outputs of six summed branches round more.
        wrong = {
            name: value
            for name, value in found.items()
            if value > (5e-6 if name in ("evaluation", "output") else TOLERANCE)
        }
        assert not wrong, f"{runtime}: {wrong}"


def test_several_inputs_and_branches_train_as_in_keras() -> None:
    keras.utils.set_random_seed(1)
    image = keras.Input((6, 6, 1), name="image")
    words = keras.Input((5,), name="words", dtype="int32")
    facts = keras.Input((3,), name="facts")
    branches = [
        L.Flatten()(L.Conv2D(3, 3, activation="relu")(image)),
        L.GRU(4)(L.Embedding(12, 4)(words)),
        L.Dense(4, activation="tanh")(facts),
    ]
    shared = L.Dense(4)
    both = L.Add()([shared(branches[1]), shared(branches[2])])
    outputs = L.Dense(3)(L.Concatenate()([branches[0], both]))
    model = classifier([image, words, facts], outputs, metrics=["accuracy"])
    for found in compare(model).values():
        assert max(found.values()) < TOLERANCE


def test_inputs_named_in_a_dict_train_as_in_keras() -> None:
    keras.utils.set_random_seed(1)
    inputs = {"b": keras.Input((3,), name="b"), "a": keras.Input((2,), name="a")}
    outputs = L.Dense(3)(L.Concatenate()([inputs["a"], L.Dense(4, activation="relu")(inputs["b"])]))
    for found in compare(classifier(inputs, outputs)).values():
        assert max(found.values()) < TOLERANCE


def test_a_model_class_of_the_users_own_trains_as_in_keras() -> None:
    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = L.Dense(5), L.Dropout(0.3), L.Dense(3)

        def call(self, x: object) -> object:
            return self.last(self.drop(keras.ops.relu(self.first(x))))

    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="x")
    for found in compare(classifier(inputs, Own()(inputs))).values():
        assert max(found.values()) < TOLERANCE


def test_short_batches_of_batch_normalisation_count_only_their_rows() -> None:
    # Two steps, the second with 2 of 4 rows: Keras sees a batch of 2.
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2))
    x = L.BatchNormalization()(L.Conv2D(4, 3)(inputs))
    x = L.BatchNormalization()(L.Dense(5)(L.Flatten()(x)))
    found = compare(classifier(inputs, L.Dense(3)(x)), steps=2)
    assert all(max(values.values()) < TOLERANCE for values in found.values())


def test_batch_statistics_travel_and_frozen_layers_do_not() -> None:
    keras.utils.set_random_seed(1)
    frozen = L.Dense(5, name="frozen")
    frozen.trainable = False
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="norm")(frozen(inputs))
    task = export(classifier(inputs, L.Dense(3, name="head")(x)), OPTIONS).task
    assert [spec.name for spec in task.weights] == [
        "norm/gamma", "norm/beta", "head/kernel", "head/bias",
        "norm/moving_mean", "norm/moving_variance",
    ]  # fmt: skip
    assert task.trainable_count == 4


def test_dropout_asks_for_fresh_random_numbers_at_each_step() -> None:
    inputs = keras.Input((4,))
    outputs = L.Dense(3)(L.GaussianNoise(0.1)(L.Dropout(0.5)(inputs)))
    task = export(classifier(inputs, outputs), OPTIONS).task
    assert [(noise.kind, noise.shape) for noise in task.noise] == [
        ("uniform", (4, 4)), ("normal", (4, 4)),
    ]  # fmt: skip


def test_the_users_model_comes_back_as_it_was() -> None:
    inputs, outputs, _ = side_by_side("sequence", ["GRU", "BatchNormalization, sequences"])
    model = classifier(inputs, outputs)
    before = [v.numpy() for v in model.variables]
    compare(model, steps=2)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    gru = next(layer for layer in model.layers if isinstance(layer, L.GRU))
    assert gru.unroll is False
    assert gru.use_cudnn == "auto"


@pytest.mark.parametrize(
    ("name", "layers", "sentence"),
    [
        ("Conv3D", [keras.Input((4, 4, 4, 1)), L.Conv3D(2, 2)],
         "Conv3D.*no builtin kernel.*use Conv2D"),
        ("MaxPooling3D", [keras.Input((4, 4, 4, 1)), L.Conv3D(2, 1), L.MaxPooling3D(2)],
         "3D.*no builtin kernel.*use"),
        ("stateful", [keras.Input((4, 2), batch_size=4), L.GRU(2, stateful=True)],
         r"'gru\w*' \(GRU\) is stateful"),
        ("channels first", [keras.Input((1, 4, 4)), L.Conv2D(2, 2, data_format="channels_first")],
         "is channels_first"),
        ("float64", [keras.Input((4,)), L.Dense(2, dtype="float64")], "computes in float64"),
        ("float16", [keras.Input((4,)), L.Dense(2, dtype="mixed_float16")], "computes in float16"),
        ("open shape", [keras.Input((None, 3), name="steps"), L.GRU(2)],
         r"input 'steps' has the open shape \[None, None, 3\]"),
        ("randint", [keras.Input((4,)), L.Lambda(
            lambda x: x * keras.ops.cast(keras.random.randint((4,), 0, 2), "float32"))],
         "keras.random.randint cannot run on a device"),
    ],
)  # fmt: skip
def test_what_a_device_cannot_do_is_refused_with_advice(
    name: str, layers: list[object], sentence: str
) -> None:
    x = layers[0]
    for layer in layers[1:]:
        x = layer(x)  # type: ignore[operator]
    if len(x.shape) != 2:  # type: ignore[attr-defined]
        x = L.Flatten()(x)
    with pytest.raises(LocalError, match=sentence):
        export(classifier(layers[0], L.Dense(3)(x)), OPTIONS)


def test_numbers_that_would_be_frozen_are_refused() -> None:
    class Noisy(L.Layer):  # type: ignore[misc]
        def call(self, x: object) -> object:
            return x + tf.random.uniform([4, 4])  # type: ignore[operator]

    inputs = keras.Input((4,))
    with pytest.raises(LocalError, match=r"RandomUniform in .*noisy.*use keras\.random"):
        export(classifier(inputs, L.Dense(3)(Noisy()(inputs))), OPTIONS)


def test_a_float64_input_is_refused() -> None:
    inputs = keras.Input((4,), dtype="float64", name="x")
    with pytest.raises(LocalError, match="the input 'x' is float64"):
        export(classifier(inputs, L.Dense(3)(L.Rescaling(1.0)(inputs))), OPTIONS)


def test_two_outputs_are_refused() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [L.Dense(2)(inputs), L.Dense(2)(inputs)])
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(LocalError, match="2 outputs: a task has one"):
        export(model, OPTIONS)


def test_a_model_without_known_input_is_refused() -> None:
    model = keras.Sequential([L.Dense(2)])
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(LocalError, match=r"start it with keras\.Input"):
        export(model, OPTIONS)


def test_a_weight_that_the_loss_ignores_is_named() -> None:
    inputs = keras.Input((4,))
    unused = L.Dense(3, name="unused")
    x = keras.layers.Lambda(lambda pair: pair[0])([L.Dense(3)(inputs), unused(inputs)])
    with pytest.raises(LocalError, match="does not depend on the weight unused/kernel"):
        export(classifier(inputs, x), OPTIONS)
