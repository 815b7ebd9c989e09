"""Server optimisers, held against the papers' formulas written out for one value."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.errors import LocalError
from broker_bridge.wire import weights as wire
from broker_bridge.wire.weights import specs_of
from server.aggregation.optimisers import (
    OPTIMISERS,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimiser,
)

WEIGHTS = {
    "kernel": np.array([[1.0, -2.0], [0.5, 0.0]], np.float32),
    "mean": np.array([10.0], np.float32),
    "scale": np.array(3.0, np.float32),
    "steps": np.array([7], np.int64),
}
DELTA = {
    "kernel": np.array([[0.1, -0.2], [0.0, 0.4]], np.float32),
    "mean": np.array([-1.0], np.float32),
    "scale": np.array(0.25, np.float32),
}
every = pytest.mark.parametrize("name", OPTIMISERS)


def steps(optimiser: ServerOptimiser, deltas: list[float]) -> Iterator[float]:
    """The weight, from zero, after each round with these mean deltas."""
    weights: dict[str, Any] = {"x": np.zeros(1, np.float32)}
    state = optimiser.init(specs_of(weights))
    for delta in deltas:
        mean = {"x": np.array([delta], np.float32)}
        weights, state = optimiser.apply(weights, mean, state)
        yield float(weights["x"][0])


# ── By the papers ───────────────────────────────────────────────────────────────────────


def test_fedavg_with_a_rate_of_one_adds_the_mean() -> None:
    new, _ = FedAvg().apply(WEIGHTS, DELTA, {})
    assert (new["kernel"] == WEIGHTS["kernel"] + DELTA["kernel"]).all()


def test_fedavg_goes_as_far_as_its_rate_says() -> None:
    assert list(steps(FedAvg(learning_rate=0.5), [1.0, 1.0, -4.0])) == [0.5, 1.0, -1.0]


def test_fedavgm_keeps_its_momentum() -> None:
    found = list(steps(FedAvgM(learning_rate=1.0, momentum=0.5), [1.0, 1.0, 0.0, 0.0]))
    assert found == [1.0, 2.5, 3.25, 3.625]


def adam(v: float, square: float) -> float:
    return 0.9 * v + (1 - 0.9) * square


def yogi(v: float, square: float) -> float:
    return v - (1 - 0.9) * square * math.copysign(1, v - square)


@pytest.mark.parametrize(("kind", "second_moment"), [(FedAdam, adam), (FedYogi, yogi)])
@given(deltas=st.lists(st.floats(-1, 1, width=32).filter(lambda x: abs(x) > 1e-3), max_size=8))
def test_the_adaptive_ones_follow_algorithm_2_of_reddi(
    kind: Callable[..., ServerOptimiser],
    second_moment: Callable[[float, float], float],
    deltas: list[float],
) -> None:
    rate, tau = 0.1, 1e-2
    x, m, v = 0.0, 0.0, tau**2
    optimiser = kind(learning_rate=rate, beta_1=0.8, beta_2=0.9, tau=tau)
    for delta, found in zip(deltas, steps(optimiser, deltas), strict=True):
        m = 0.8 * m + 0.2 * delta
        v = second_moment(v, delta**2)
        x += rate * m / (math.sqrt(v) + tau)
        assert math.isclose(found, x, rel_tol=1e-4, abs_tol=1e-5)


@every
def test_each_walks_to_the_minimum_of_a_bowl(name: str) -> None:
    rate = 0.05 if name in {"fedadam", "fedyogi"} else 0.3
    optimiser = OPTIMISERS[name](learning_rate=rate)
    goal = np.array([1.0, -2.0, 0.5], np.float32)
    weights: dict[str, Any] = {"x": np.zeros(3, np.float32)}
    state = optimiser.init(specs_of(weights))
    for _ in range(400):
        weights, state = optimiser.apply(weights, {"x": 0.1 * (goal - weights["x"])}, state)
    assert np.abs(weights["x"] - goal).max() < 0.1


# ── What all of them promise ────────────────────────────────────────────────────────────


@every
def test_what_is_not_trained_is_averaged_plainly_and_integers_stay(name: str) -> None:
    optimiser = OPTIMISERS[name](learning_rate=0.01, plain=frozenset({"mean", "scale"}))
    state = optimiser.init(specs_of(WEIGHTS))
    new, new_state = optimiser.apply(WEIGHTS, DELTA, state)
    assert new["mean"].tolist() == [9.0]
    assert new["scale"].tolist() == 3.25
    assert new["steps"].tolist() == [7]
    assert (new["kernel"] != WEIGHTS["kernel"] + DELTA["kernel"]).any()
    assert all(key.endswith("/kernel") for key in new_state)


@every
def test_shapes_types_and_order_stay(name: str) -> None:
    optimiser = OPTIMISERS[name]()
    state = optimiser.init(specs_of(WEIGHTS))
    new, new_state = optimiser.apply(WEIGHTS, DELTA, state)
    assert specs_of(new) == specs_of(WEIGHTS)
    assert specs_of(new_state) == specs_of(state)
    assert all(isinstance(array, np.ndarray) for array in (*new.values(), *new_state.values()))


@every
def test_what_goes_in_is_not_changed(name: str) -> None:
    optimiser = OPTIMISERS[name]()
    state = optimiser.init(specs_of(WEIGHTS))
    before = [wire.encode(tensors) for tensors in (WEIGHTS, DELTA, state)]
    optimiser.apply(WEIGHTS, DELTA, state)
    assert [wire.encode(tensors) for tensors in (WEIGHTS, DELTA, state)] == before


@every
def test_a_state_that_was_stored_goes_on_to_the_same_bits(name: str) -> None:
    optimiser = OPTIMISERS[name]()
    weights, state = optimiser.apply(WEIGHTS, DELTA, optimiser.init(specs_of(WEIGHTS)))
    stored = optimiser.apply(
        wire.decode(wire.encode(weights)), DELTA, wire.decode(wire.encode(state))
    )
    kept = optimiser.apply(weights, DELTA, state)
    assert [wire.encode(t) for t in stored] == [wire.encode(t) for t in kept]


@every
def test_a_model_that_would_not_be_finite_is_refused_with_advice(name: str) -> None:
    optimiser = OPTIMISERS[name](learning_rate=1e38)
    with pytest.raises(LocalError, match=r"kernel.*lower the server's learning rate"):
        optimiser.apply(
            {"kernel": np.full(2, 3e38, np.float32)},
            {"kernel": np.ones(2, np.float32)},
            optimiser.init([wire.TensorSpec("kernel", "float32", (2,))]),
        )
