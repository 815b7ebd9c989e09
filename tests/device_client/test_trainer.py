import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.samples import Samples
from broker_bridge.task.taskfile import Training, decode_task
from device_client.trainer import Progress, Trainer, TrainingDivergedError

PLAN, WEIGHTS = decode_task(Path("examples/wearables/wearables.task").read_bytes())
RUNTIME = TaskRuntime(PLAN)
ONCE = Training(epochs=1, learning_rate=0.01, clip_norm=1.0)


def samples(rows: int = 70, seed: int = 0) -> Samples:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 7, rows).astype(np.int32)
    inputs = draw.normal(size=(rows, 50, 6)).astype(np.float32)
    inputs[:, :, 0] += labels[:, None] - 3
    return Samples((inputs,), labels)


def test_training_lowers_the_loss_and_changes_every_tensor() -> None:
    trainer = Trainer(RUNTIME, samples())
    before = trainer.evaluate(WEIGHTS)
    trained = trainer.train(
        WEIGHTS, Training(epochs=8, learning_rate=0.02), seed=1, on_step=lambda _: True
    )
    assert trained is not None
    assert trainer.evaluate(trained.weights).loss < 0.8 * before.loss
    assert list(trained.weights) == list(WEIGHTS)
    assert all((trained.weights[name] != WEIGHTS[name]).any() for name in WEIGHTS)
    assert trained.examples == 70
    assert trained.steps == 24
    assert 0 <= trained.metrics["accuracy"] <= 1


def test_one_seed_gives_one_result_and_another_seed_another() -> None:
    trainer = Trainer(RUNTIME, samples())
    first, again, other = (
        trainer.train(WEIGHTS, ONCE, seed=seed, on_step=lambda _: True) for seed in (1, 1, 2)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    for name in WEIGHTS:
        np.testing.assert_array_equal(first.weights[name], again.weights[name])
    assert any((first.weights[name] != other.weights[name]).any() for name in WEIGHTS)


def test_every_step_is_told_and_the_last_one_is_the_last() -> None:
    seen: list[Progress] = []
    Trainer(RUNTIME, samples()).train(
        WEIGHTS, Training(epochs=2), seed=1, on_step=lambda p: not seen.append(p)
    )
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert {progress.steps for progress in seen} == {6}


def test_training_stops_between_steps() -> None:
    seen: list[Progress] = []

    def two_steps(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step < 2

    assert Trainer(RUNTIME, samples()).train(WEIGHTS, ONCE, seed=1, on_step=two_steps) is None
    assert len(seen) == 2


def test_a_short_batch_counts_only_its_own_rows() -> None:
    # Three rows alone, and the same three among rows of weight 0, are one gradient…
    few = samples(3)
    state = RUNTIME.fresh_state(WEIGHTS)
    short = RUNTIME.train_step(state, few.inputs, few.labels, None, ONCE, state.weights, 7)
    # …up to the factor that Keras gives a batch: it divides by rows, weighted 0 or not.
    inputs = np.concatenate([few.inputs[0], np.ones((29, 50, 6), np.float32)])
    labels = np.concatenate([few.labels, np.zeros(29, np.int32)])
    weight = np.array([32 / 3] * 3 + [0] * 29, np.float32)
    full = RUNTIME.train_step(state, (inputs,), labels, weight, ONCE, state.weights, 7)
    assert short.loss == pytest.approx(full.loss, rel=1e-5)
    for a, b in zip(short.state.weights, full.state.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_sample_weights_are_what_evaluation_averages_by() -> None:
    data = samples(10)
    doubled = Samples(data.inputs, data.labels, np.array([1, 1] + [0] * 8, np.float32))
    only = Samples((data.inputs[0][:2],), data.labels[:2])
    weighted, plain = RUNTIME.evaluate(WEIGHTS, doubled), RUNTIME.evaluate(WEIGHTS, only)
    assert weighted.loss == pytest.approx(plain.loss, rel=1e-5)
    assert weighted.metrics == plain.metrics


def test_inference_agrees_with_the_accuracy_that_evaluation_reports() -> None:
    data = samples(150)
    outputs = RUNTIME.infer(WEIGHTS, data.inputs)
    right = float(np.mean(outputs.argmax(1) == data.labels))
    assert outputs.shape == (150, 7)
    assert RUNTIME.evaluate(WEIGHTS, data).metrics["accuracy"] == pytest.approx(right)


def test_the_proximal_term_holds_weights_near_where_they_started() -> None:
    trainer = Trainer(RUNTIME, samples())

    def distance(mu: float) -> float:
        settings = Training(epochs=5, learning_rate=0.01, proximal_mu=mu)
        trained = trainer.train(WEIGHTS, settings, seed=1, on_step=lambda _: True)
        assert trained is not None
        return float(sum(np.abs(trained.weights[n] - WEIGHTS[n]).sum() for n in WEIGHTS))

    assert distance(3.0) < 0.8 * distance(0.0)


def test_a_clipped_step_is_no_longer_than_rate_times_bound() -> None:
    data, state = samples(32), RUNTIME.fresh_state(WEIGHTS)
    settings = Training(learning_rate=1.0, clip_norm=0.01)
    step = RUNTIME.train_step(state, data.inputs, data.labels, None, settings, state.weights, 0)
    moved = [(a - b).ravel() for a, b in zip(step.state.weights, state.weights, strict=True)]
    assert np.linalg.norm(np.concatenate(moved)) == pytest.approx(0.01, rel=1e-4)


def test_dropout_follows_the_seed_and_nothing_else() -> None:
    data, state = samples(32), RUNTIME.fresh_state(WEIGHTS)
    losses = [
        RUNTIME.train_step(state, data.inputs, data.labels, None, ONCE, state.weights, seed).loss
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_loss_that_explodes_is_refused_with_advice() -> None:
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        Trainer(RUNTIME, samples()).train(
            WEIGHTS, Training(epochs=20, learning_rate=1e30), seed=1, on_step=lambda _: True
        )


def test_optimiser_state_is_kept_only_where_the_task_says_so() -> None:
    keeping = TaskRuntime(
        type(PLAN)(
            msgspec.structs.replace(PLAN.task, keep_optimiser_state=True), PLAN.tflite, PLAN.digest
        )
    )
    for runtime, kept in ((RUNTIME, False), (keeping, True)):
        trainer = Trainer(runtime, samples())
        first = trainer.train(WEIGHTS, ONCE, seed=1)
        assert first is not None
        fresh = trainer.train(first.weights, ONCE, seed=2)
        after = trainer.train(first.weights, ONCE, seed=2, optimiser_state=first.optimiser_state)
        assert fresh is not None
        assert after is not None
        differs = any((fresh.weights[n] != after.weights[n]).any() for n in WEIGHTS)
        assert differs == kept


def test_kept_state_of_another_shape_is_dropped() -> None:
    keeping = TaskRuntime(
        type(PLAN)(
            msgspec.structs.replace(PLAN.task, keep_optimiser_state=True), PLAN.tflite, PLAN.digest
        )
    )
    broken = {slot.tensor.name: np.zeros(1, np.float32) for slot in PLAN.task.optimiser_state}
    trainer = Trainer(keeping, samples())
    fresh = trainer.train(WEIGHTS, ONCE, seed=1)
    after = trainer.train(WEIGHTS, ONCE, seed=1, optimiser_state=broken)
    assert fresh is not None
    assert after is not None
    assert all((fresh.weights[n] == after.weights[n]).all() for n in WEIGHTS)


def test_weights_of_another_task_are_refused() -> None:
    with pytest.raises(PeerError, match="not the weights"):
        Trainer(RUNTIME, samples()).train({}, ONCE, seed=1)


def test_samples_of_another_task_are_refused() -> None:
    with pytest.raises(LocalError, match="row 0: 7 is outside 0 … 6"):
        Trainer(RUNTIME, Samples(samples(2).inputs, np.array([7, 0])))


def test_a_file_that_is_not_a_model_does_not_load() -> None:
    with pytest.raises(LocalError, match="does not load in"):
        TaskRuntime(type(PLAN)(PLAN.task, b"nonsense" * 10, PLAN.digest))


def test_training_holds_no_more_than_one_state_however_many_steps() -> None:
    trainer, settings = Trainer(RUNTIME, samples(640)), Training(epochs=3, learning_rate=0.001)
    tracemalloc.start()
    trainer.train(WEIGHTS, settings, seed=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    model_bytes = sum(array.nbytes for array in WEIGHTS.values())
    # The state, its successor, momentum for both, and what a call passes and returns.
    assert peak < 12 * model_bytes
