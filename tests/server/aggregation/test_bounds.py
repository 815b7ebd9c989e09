"""The norm of one update, and where the line is."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from broker_bridge.wire.weights import encode, specs_of
from server.aggregation.bounds import check_norm
from server.aggregation.exact import ExactSum


def add(deltas: dict[str, NDArray[Any]], *, delta_bound: float, bits: int = 8) -> ExactSum:
    """Add one update to a sum of its own, as a round with this bound would."""
    total = ExactSum(specs_of(deltas), fraction_bits=bits)
    total.add(encode(deltas), 1, delta_bound=delta_bound)
    return total


def refused(deltas: dict[str, NDArray[Any]], *, delta_bound: float) -> PeerError:
    with pytest.raises(PeerError) as caught:
        add(deltas, delta_bound=delta_bound)
    return caught.value


def test_the_norm_is_taken_over_all_tensors_together() -> None:
    deltas = {"a": np.array([3.0], np.float32), "b": np.array([[4.0], [12.0]], np.float32)}
    add(deltas, delta_bound=13.0)
    error = refused(deltas, delta_bound=12.9)
    assert error.reason == "out_of_bounds"
    assert "norm is 13; this round allows 12.9" in str(error)


def test_the_norm_is_taken_over_what_integers_lie_between() -> None:
    deltas = {
        "a": np.array([3.0], np.float32),
        "steps": np.array([2**62]),
        "mask": np.array([True]),
        "b": np.array([4.0, 12.0], np.float32),
    }
    add(deltas, delta_bound=13.0)
    assert "norm is 13;" in str(refused(deltas, delta_bound=12.9))


@given(
    arrays(np.float32, 50, elements=st.floats(-1e10, 1e10, width=32)),
    st.floats(1e-3, 1e3),
)
def test_a_delta_that_a_device_scaled_to_the_bound_is_in_bounds(
    delta: NDArray[np.float32], bound: float
) -> None:
    norm = float(np.linalg.norm(delta.astype(np.float64)))
    scaled = delta * np.float32(min(1.0, bound / norm)) if norm > 0 else delta
    add({"x": scaled}, delta_bound=bound)


def test_a_hair_above_the_bound_is_out_of_bounds() -> None:
    error = refused({"x": np.array([1.0001], np.float32)}, delta_bound=1.0)
    assert error.reason == "out_of_bounds"


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 131_072])
def test_one_value_in_any_block_counts(place: int) -> None:
    delta = np.zeros(2 * 65_536 + 1, np.float32)
    delta[place] = 2.0
    add({"x": delta}, delta_bound=2.0)
    assert "norm is 2;" in str(refused({"x": delta}, delta_bound=1.99))


def test_the_largest_float32_does_not_overflow_the_norm() -> None:
    largest = np.full(4, np.finfo(np.float32).max)
    norm = 2 * float(np.finfo(np.float32).max)
    error = refused({"x": largest}, delta_bound=norm * 0.99)
    assert f"norm is {norm:.6g};" in str(error)
    assert refused({"x": largest}, delta_bound=norm).reason == "overflow"  # of the sum, not here


def test_an_update_without_a_bound_is_not_judged() -> None:
    """It was, before it got its receipt: it is only read again."""
    deltas = {"x": np.array([100.0], np.float32)}
    total = ExactSum(specs_of(deltas), fraction_bits=8)
    total.add(encode(deltas), 1)
    assert total.digest() == add(deltas, delta_bound=100.0).digest()


def test_integer_tensors_have_no_norm() -> None:
    add({"steps": np.array([2**62])}, delta_bound=0.1)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_allows_nothing_is_our_own_mistake(bound: float) -> None:
    with pytest.raises(ValueError, match="greater than zero"):
        check_norm(0.0, delta_bound=bound)
