"""The norm of one update, and where the line is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from server.aggregation.bounds import check_update, l2_norm


def test_the_norm_is_taken_over_all_tensors_together() -> None:
    deltas = {"a": np.array([3.0], np.float32), "b": np.array([[4.0], [12.0]], np.float32)}
    assert l2_norm(deltas) == 13.0
    check_update(deltas, delta_bound=13.0)
    with pytest.raises(PeerError, match=r"norm is 13; this round allows 12\.9") as caught:
        check_update(deltas, delta_bound=12.9)
    assert caught.value.reason == "out_of_bounds"


@given(
    arrays(np.float32, 50, elements=st.floats(-1e10, 1e10, width=32)),
    st.floats(1e-3, 1e3),
)
def test_a_delta_that_a_device_scaled_to_the_bound_is_in_bounds(
    delta: NDArray[np.float32], bound: float
) -> None:
    norm = float(np.linalg.norm(delta.astype(np.float64)))
    scaled = delta * np.float32(min(1.0, bound / norm)) if norm > 0 else delta
    check_update({"x": scaled}, delta_bound=bound)


def test_a_hair_above_the_bound_is_out_of_bounds() -> None:
    with pytest.raises(PeerError):
        check_update({"x": np.array([1.0001], np.float32)}, delta_bound=1.0)


def test_one_value_beyond_a_block_counts() -> None:
    delta = np.zeros(65_537, np.float32)
    delta[-1] = 2.0
    assert l2_norm({"x": delta}) == 2.0


def test_the_largest_float32_does_not_overflow_the_norm() -> None:
    largest = np.full(4, np.finfo(np.float32).max)
    assert l2_norm({"x": largest}) == 2 * float(np.finfo(np.float32).max)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_called_so(value: float) -> None:
    with pytest.raises(PeerError) as caught:
        check_update({"x": np.array([0, value], np.float32)}, delta_bound=1e9)
    assert caught.value.reason == "not_finite"


def test_integer_tensors_have_no_norm() -> None:
    check_update({"steps": np.array([2**62])}, delta_bound=0.1)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_that_allows_nothing_is_our_own_mistake(bound: float) -> None:
    with pytest.raises(ValueError, match="greater than zero"):
        check_update({}, delta_bound=bound)
