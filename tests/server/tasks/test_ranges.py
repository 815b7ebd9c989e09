"""Tokens beyond a task's vocabulary are refused, wherever in the model they are looked up."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

from broker_bridge.errors import LocalError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Training
from server.tasks.exporter import export
from server.tasks.options import TaskOptions
from tests.server.tasks.compare import classifier

OPTIONS = TaskOptions(name="words", batch_size=4, evaluation_batch_size=4)


class Own(L.Layer):  # type: ignore[misc]
    def build(self, _shape: Any) -> None:
        self.table = self.add_weight(shape=(9, 3), name="table")

    def call(self, x: Any) -> Any:
        return keras.ops.take(self.table, x, axis=0)


def plain(x: Any) -> Any:
    return L.Embedding(9, 3)(x)


def nested(x: Any) -> Any:
    return keras.Sequential([keras.Input((5,), dtype="int32"), L.Embedding(9, 3)])(x)


def folded(x: Any) -> Any:
    return plain(L.Permute((2, 1))(L.Reshape((5, 1))(x)))


LOOKED_UP: dict[str, Callable[[Any], Any]] = {
    "plain": plain, "nested": nested, "reshaped": folded, "a layer of one's own": Own(),
    "the smaller of two tables": lambda x: L.Concatenate()([L.Embedding(20, 2)(x), plain(x)]),
}  # fmt: skip


def reader_of(block: Callable[[Any], Any], shape: tuple[int, ...] = (5,)) -> Any:
    keras.utils.set_random_seed(2)
    inputs = keras.Input(shape, dtype="int32", name="tokens")
    return classifier(inputs, L.Dense(3)(L.Flatten()(block(inputs))))


@pytest.mark.parametrize("name", LOOKED_UP)
def test_the_range_of_tokens_is_that_of_the_table(name: str) -> None:
    assert export(reader_of(LOOKED_UP[name]), OPTIONS).task.input_ranges == ((0.0, 8.0),)


def test_a_column_beyond_its_table_stops_training_with_a_sentence() -> None:
    # The second column holds no tokens, and may hold anything: the input has no range.
    built = export(reader_of(lambda x: plain(x[:, :, 0]), (5, 2)), OPTIONS)
    assert built.task.input_ranges == ()
    runtime = TaskRuntime(built.plan)
    weights = {
        spec.name: v.numpy()
        for spec, v in zip(built.task.weights, built.subject.variables, strict=True)
    }
    tokens = np.full((4, 5, 2), 99, np.int32)
    labels = np.zeros(4, np.int32)
    with pytest.raises(LocalError, match="a token or index beyond those that the task 'words' kno"):
        runtime.evaluate(weights, Samples((tokens,), labels))
    state = runtime.fresh_state(weights)
    with pytest.raises(LocalError, match="beyond those that the task"):
        runtime.train_step(state, [tokens], labels, None, Training(), state.weights, 1)
    tokens[:, :, 0] = 8
    assert np.isfinite(runtime.evaluate(weights, Samples((tokens,), labels)).loss)
