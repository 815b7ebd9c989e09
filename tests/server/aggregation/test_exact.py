"""Sums that are exact: held against Fractions, in any order, whatever is refused between."""

import hashlib
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.weights import TensorSpec, encode
from server.aggregation.exact import SUM_MAX, ExactSum

SPECS = (
    TensorSpec("kernel", "float32", (2, 2)),
    TensorSpec("bias", "float32", (2,)),
    TensorSpec("scale", "float32", ()),
    TensorSpec("nothing", "float32", (0, 4)),
)
BITS = 24

Deltas = dict[str, NDArray[Any]]
Update = tuple[Deltas, int]

values = st.floats(-1e4, 1e4, width=32)
deltas = st.lists(values, min_size=7, max_size=7).map(lambda given: filled(given))
updates = st.lists(st.tuples(deltas, st.integers(1, 10_000)), min_size=1, max_size=5)


def filled(given: list[float]) -> Deltas:
    """An update with these seven values."""
    flat = np.array(given, np.float32)
    return {
        "kernel": flat[:4].reshape(2, 2),
        "bias": flat[4:6],
        "scale": flat[6].reshape(()),
        "nothing": flat[:0].reshape(0, 4),
    }


def summed(updates: list[Update], *, bits: int = BITS) -> ExactSum:
    total = ExactSum(SPECS, fraction_bits=bits)
    for delta, weight in updates:
        total.add(encode(delta), weight)
    return total


def zeros() -> Deltas:
    return {spec.name: np.zeros(spec.shape, np.float32) for spec in SPECS}


def one(value: float) -> tuple[ExactSum, bytes]:
    """A sum over a single tensor of a single value, and an update of that value."""
    spec = TensorSpec("x", "float32", (1,))
    return ExactSum([spec], fraction_bits=BITS), single(value)


def single(value: float) -> bytes:
    return encode({"x": np.array([value], np.float32)})


# ── Exact ───────────────────────────────────────────────────────────────────────────────


def fixed_point(value: np.float32, bits: int) -> int:
    return round(Fraction(float(value)) * 2**bits)  # Python too rounds halves to even


@given(updates, st.integers(8, 28))
def test_the_mean_is_that_of_a_sum_without_any_rounding(updates: list[Update], bits: int) -> None:
    mean = summed(updates, bits=bits).mean()
    weight = sum(w for _, w in updates)
    for spec in SPECS:
        for place in np.ndindex(spec.shape):
            exact = sum(w * fixed_point(d[spec.name][place], bits) for d, w in updates)
            # float(exact) rounds the true integer; from there on only IEEE 754.
            expected = np.float32(float(exact) / float(weight) * 2.0**-bits)
            assert mean[spec.name][place].tobytes() == expected.tobytes()


@given(updates)
def test_each_value_is_right_to_half_a_fraction_bit(updates: list[Update]) -> None:
    mean = summed(updates).mean()
    weight = sum(w for _, w in updates)
    for place in np.ndindex((2, 2)):
        true = sum(w * Fraction(float(d["kernel"][place])) for d, w in updates) / weight
        rounding = abs(true) / 2**23 + Fraction(1, 2**120)  # of the float32 that is returned
        assert abs(Fraction(float(mean["kernel"][place])) - true) <= (
            Fraction(1, 2 ** (BITS + 1)) + rounding
        )


@given(updates, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(updates: list[Update], random: Any) -> None:
    shuffled = list(updates)
    random.shuffle(shuffled)
    assert summed(updates).digest() == summed(shuffled).digest()
    assert summed(updates).state() == summed(shuffled).state()


@given(updates, updates, st.randoms())
def test_what_was_taken_out_has_left_no_bit_behind(
    kept: list[Update], taken: list[Update], random: Any
) -> None:
    total = summed(random.sample([*kept, *taken], len(kept) + len(taken)))
    for delta, weight in taken:
        total.remove(encode(delta), weight)
    assert total.digest() == summed(kept).digest()


def test_any_order_gives_the_same_bits_where_floats_would_not() -> None:
    big, small = np.float32(1e6), np.float32(2**-20)
    assert (big + small) + -big != (big + -big) + small
    orders = ([big, small, -big], [big, -big, small], [small, big, -big])
    results = []
    for order in orders:
        total, _ = one(0)
        for value in order:
            total.add(single(value), 1)
        results.append(total.mean()["x"].tobytes())
    assert results == [np.float32(2**-20 / 3).tobytes()] * 3


def test_a_tensor_larger_than_a_block_is_summed_to_its_end() -> None:
    size = 2 * 65_536 + 17
    spec = TensorSpec("x", "float32", (size,))
    total = ExactSum([spec], fraction_bits=16)
    delta = np.arange(size, dtype=np.float32)
    total.add(encode({"x": delta}), 3)
    total.add(encode({"x": delta}), 4)
    assert total.mean()["x"].tobytes() == delta.tobytes()


def test_the_sum_of_ten_updates_is_frozen() -> None:
    total = ExactSum(SPECS, fraction_bits=BITS)
    for number in range(10):
        delta = {
            spec.name: (np.arange(spec.size, dtype=np.float32) / (number + 1)).reshape(spec.shape)
            for spec in SPECS
        }
        total.add(encode(delta), number + 1)
    assert (total.count, total.weight) == (10, 55)
    assert (
        total.digest().hex() == "807e722b46a311264e67831521786eac8401db92ffe2646f66a66de129a472a0"
    )
    assert total.mean()["bias"].tolist() == [0.0, 0.1818181872367859]


# ── Integer tensors ─────────────────────────────────────────────────────────────────────


def test_integer_tensors_must_be_there_and_are_not_averaged() -> None:
    specs = (TensorSpec("x", "float32", (1,)), TensorSpec("steps", "int64", (1,)))
    total = ExactSum(specs, fraction_bits=BITS)
    x = np.ones(1, np.float32)
    total.add(encode({"x": x, "steps": np.array([2**62])}), 5)
    assert list(total.mean()) == ["x"]
    with pytest.raises(PeerError, match="expected 2 tensors, got 1"):
        total.add(encode({"x": x}), 1)


# ── Refusals change nothing ─────────────────────────────────────────────────────────────


def with_value(value: float) -> Deltas:
    delta = zeros()
    delta["bias"][1] = value  # after a tensor that is in order
    return delta


REFUSED: dict[str, tuple[Deltas, Any, str]] = {
    "nan": (with_value(np.nan), 1, "not_finite"),
    "infinity": (with_value(np.inf), 1, "not_finite"),
    "minus infinity": (with_value(-np.inf), 1, "not_finite"),
    "no weight": (zeros(), 0, "bad_weight"),
    "negative weight": (zeros(), -1, "bad_weight"),
    "weight above the cap": (zeros(), 10**9 + 1, "bad_weight"),
    "fractional weight": (zeros(), 1.5, "bad_weight"),
    "weight that is a truth value": (zeros(), True, "bad_weight"),
    "too large to sum": (with_value(3e38), 1, "overflow"),
    "too heavy to sum": (with_value(1e6), 10**9, "overflow"),
    "missing tensor": ({"kernel": zeros()["kernel"]}, 1, "wrong_shape"),
    "no tensor": ({}, 1, "wrong_shape"),
    "extra tensor": ({**zeros(), "extra": np.zeros(1, np.float32)}, 1, "wrong_shape"),
    "other order": (dict(reversed(zeros().items())), 1, "wrong_shape"),
    "other shape": ({**zeros(), "bias": np.zeros((1, 2), np.float32)}, 1, "wrong_shape"),
    "integers": ({**zeros(), "bias": np.zeros(2, np.int32)}, 1, "wrong_shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_update_changes_nothing(name: str) -> None:
    delta, weight, reason = REFUSED[name]
    total = summed([(with_value(0.5), 7)])
    before = total.state()
    with pytest.raises(PeerError) as caught:
        total.add(encode(delta), weight)
    assert caught.value.reason == reason
    assert total.state() == before


@given(updates, st.sampled_from(sorted(REFUSED)), st.integers(0, 6))
def test_a_refused_update_anywhere_leaves_the_result_as_it_would_be(
    updates: list[Update], name: str, place: int
) -> None:
    total = ExactSum(SPECS, fraction_bits=BITS)
    for number, (delta, weight) in enumerate(updates):
        if number == place:
            with pytest.raises(PeerError):
                total.add(encode(REFUSED[name][0]), REFUSED[name][1])
        total.add(encode(delta), weight)
    assert total.digest() == summed(updates).digest()


# ── The bound ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_is_used_to_the_last_bit(sign: int) -> None:
    """2^34 · (2^29 - 1) and (2^17 - 1) · (2^17 + 1) are 2^63 - 1 together, and not one more."""
    total, large = one(sign * 2.0 ** (34 - BITS))
    rest = single(sign * (2**17 - 1) * 2.0**-BITS)
    least = single(sign * 2.0**-BITS)
    total.add(large, 2**29 - 1)
    for refused in (large, rest):
        with pytest.raises(PeerError, match="no longer be exact"):
            total.add(refused, 2**17 + 2)
    total.add(rest, 2**17 + 1)
    with pytest.raises(PeerError, match="no longer be exact"):
        total.add(least, 1)
    total.add(single(0.0), 1)  # has nothing to add to the bound
    mean = float(sign * SUM_MAX) / float(total.weight) * 2.0**-BITS
    assert total.mean()["x"][0] == np.float32(mean)


@given(st.lists(st.tuples(st.floats(-3e9, 3e9, width=32), st.integers(1, 10**9)), max_size=30))
def test_no_sum_that_is_let_through_has_wrapped_around(pairs: list[tuple[float, int]]) -> None:
    total, _ = one(0)
    exact = size = 0
    for value, weight in pairs:
        fixed = fixed_point(np.float32(value), BITS)
        delta = single(value)
        if size + weight * abs(fixed) > SUM_MAX:  # refused where it must be, and nowhere else
            with pytest.raises(PeerError, match="no longer be exact"):
                total.add(delta, weight)
        else:
            total.add(delta, weight)
            size += weight * abs(fixed)
            exact += weight * fixed
    if total.count:
        expected = np.float32(float(exact) / float(total.weight) * 2.0**-BITS)
        assert total.mean()["x"].tobytes() == np.array([expected]).tobytes()


# ── State ───────────────────────────────────────────────────────────────────────────────


@given(updates, updates)
def test_a_checkpoint_goes_on_to_the_same_bits(before: list[Update], after: list[Update]) -> None:
    resumed = ExactSum.from_state(summed(before).state(), SPECS, fraction_bits=BITS)
    for delta, weight in after:
        resumed.add(encode(delta), weight)
    whole = summed(before + after)
    assert resumed.state() == whole.state()
    assert (resumed.count, resumed.weight) == (whole.count, whole.weight)


def test_a_checkpoint_remembers_the_bound() -> None:
    total, delta = one(2.0 ** (62 - BITS))
    total.add(delta, 1)
    resumed = ExactSum.from_state(total.state(), total.specs, fraction_bits=BITS)
    with pytest.raises(PeerError, match="no longer be exact"):
        resumed.add(delta, 1)


def test_a_checkpoint_cut_short_anywhere_is_refused() -> None:
    state = summed([(with_value(0.5), 7)]).state()
    for length in range(len(state)):
        with pytest.raises(LocalError, match="damaged"):
            ExactSum.from_state(state[:length], SPECS, fraction_bits=BITS)


def test_a_checkpoint_with_one_bit_changed_is_refused() -> None:
    state = summed([(with_value(0.5), 7)]).state()
    for place in range(len(state)):
        changed = bytearray(state)
        changed[place] ^= 1
        with pytest.raises(LocalError, match="damaged"):
            ExactSum.from_state(bytes(changed), SPECS, fraction_bits=BITS)


def test_a_checkpoint_of_another_model_or_precision_is_refused() -> None:
    state = summed([(with_value(0.5), 7)]).state()
    with pytest.raises(LocalError, match="another model"):
        ExactSum.from_state(state, SPECS[:1], fraction_bits=BITS)
    with pytest.raises(LocalError, match="another model"):
        ExactSum.from_state(state, SPECS, fraction_bits=BITS + 1)
    body = b"mgs9" + state[4:-32]
    with pytest.raises(LocalError, match="another model"):
        ExactSum.from_state(body + hashlib.sha256(body).digest(), SPECS, fraction_bits=BITS)


# ── Use ─────────────────────────────────────────────────────────────────────────────────


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="no updates"):
        ExactSum(SPECS, fraction_bits=BITS).mean()


@pytest.mark.parametrize("bits", [-1, 49])
def test_fraction_bits_out_of_range_are_our_own_mistake(bits: int) -> None:
    with pytest.raises(ValueError, match="0 to 48"):
        ExactSum(SPECS, fraction_bits=bits)


def test_memory_is_one_int64_per_value_however_many_updates() -> None:
    size = 1_000_000
    delta = encode({"x": np.ones(size, np.float32)})
    tracemalloc.start()
    try:
        total = ExactSum([TensorSpec("x", "float32", (size,))], fraction_bits=BITS)
        for _ in range(20):
            total.add(delta, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * size + 2_500_000
