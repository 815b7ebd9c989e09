"""Small updates that are summed together: as if one after another, whatever is among them."""

import math
import tracemalloc
import warnings
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.weights import TensorSpec, encode, specs_of
from server.aggregation.exact import SUM_MAX, ExactSum
from tests.server.aggregation.test_plain_sums import SPECS, Deltas, PlainSum, filled

Specs = tuple[TensorSpec, ...]
Found = list[tuple[str, str] | None]

MODEL = (  # of 2,493 values, between which others lie: 26 updates are summed at once
    TensorSpec("a", "float32", (40, 60)),
    TensorSpec("steps", "int64", (3,)),
    TensorSpec("b", "float32", (90,)),
    TensorSpec("seen", "bool", (5,)),
    TensorSpec("c", "float32", (3,)),
)


def one_by_one(total: ExactSum, updates: list[bytes], weights: list[Any], bound: Any) -> Found:
    """What `add` says to each."""
    found: Found = []
    for update, weight in zip(updates, weights, strict=True):
        try:
            total.add(update, weight, delta_bound=bound)
            found.append(None)
        except PeerError as error:
            found.append((error.reason, str(error)))
    return found


def check_alike(
    specs: Specs, bits: int, updates: list[bytes], weights: list[Any], bound: float | None
) -> Found:
    """Sum the same in both ways, after one update that was there before; return what was said."""
    first = encode({spec.name: np.ones(spec.shape, spec.dtype) for spec in specs})
    alone, together = (ExactSum(specs, fraction_bits=bits) for _ in range(2))
    for total in (alone, together):
        total.add(first, 3)
    expected = one_by_one(alone, updates, weights, bound)
    said = together.add_all(updates, weights, delta_bound=bound)
    assert [error and (error.reason, str(error)) for error in said] == expected
    assert together.state() == alone.state()
    assert (together.count, together.weight) == (alone.count, alone.weight)
    return expected


def norm_of(update: bytes, specs: Specs) -> float:
    """As `add` finds it."""
    return ExactSum(specs, fraction_bits=0)._measure(update)[0]


def bounds_near(norm: float) -> list[float]:
    """The bounds around which a norm begins to be let through."""
    bound = norm / (1 + 1e-5)
    near = [bound]
    for _ in range(3):
        near = [math.nextafter(near[0], 0), *near, math.nextafter(near[-1], math.inf)]
    return near


# ── Whatever comes ──────────────────────────────────────────────────────────────────────

HOSTILE_WEIGHTS = [0, -1, 10**9 + 1, True, 1.5, None, np.int64(3)]


def hostile(data: st.DataObject, update: bytes, specs: Specs) -> bytes:
    """An update with something wrong in it, if it has what can be wrong."""
    kind = data.draw(st.sampled_from(["nan", "inf", "huge", "short", "long", "byte", "other"]))
    floats = [spec for spec in specs if spec.dtype == "float32" and spec.size]
    if kind in ("nan", "inf", "huge") and floats:
        arrays = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}
        last = data.draw(st.sampled_from(floats)).name
        value = {"nan": math.nan, "inf": -math.inf, "huge": 3e38}[kind]
        arrays[last].reshape(-1)[-1] = value
        return encode(arrays)
    if kind == "byte":
        place = data.draw(st.integers(0, len(update) - 1))
        return update[:place] + bytes([update[place] ^ 255]) + update[place + 1 :]
    if kind == "other":
        return encode({"other": np.zeros(1, np.float32)})
    return update[:-1] if kind == "short" else update + b"\0"


@settings(deadline=None)
@given(st.data(), SPECS, st.integers(0, 48))
def test_a_group_is_summed_as_one_after_another(
    data: st.DataObject, specs: Specs, bits: int
) -> None:
    updates: list[bytes] = []
    weights: list[Any] = []
    for _ in range(data.draw(st.integers(0, 6))):
        update = encode(filled(data, specs, bits))
        weight: Any = data.draw(st.integers(1, 10**6))
        if data.draw(st.sampled_from([False, False, False, True])):
            update = hostile(data, update, specs)
        if data.draw(st.sampled_from([False] * 7 + [True])):
            weight = data.draw(st.sampled_from(HOSTILE_WEIGHTS))
        updates.append(update)
        weights.append(weight)
    bound = data.draw(st.sampled_from([None, 1e-3, 1.0, 100.0, 1e30, math.inf]))
    check_alike(specs, bits, updates, weights, bound)


@settings(deadline=None)
@given(st.data(), SPECS, st.integers(0, 48))
def test_a_group_is_the_plain_sum_to_the_last_bit(
    data: st.DataObject, specs: Specs, bits: int
) -> None:
    total, plain = ExactSum(specs, fraction_bits=bits), PlainSum(specs, bits)
    group: list[tuple[Deltas, int]] = []
    expected: list[str | None] = []
    for _ in range(data.draw(st.integers(2, 5))):
        deltas, weight = filled(data, specs, bits), data.draw(st.integers(1, 10**6))
        group.append((deltas, weight))
        has_room = plain.has_room(deltas, weight)
        if has_room:
            plain.add(deltas, weight)
        expected.append(None if has_room else "overflow")
    said = total.add_all([encode(deltas) for deltas, _ in group], [weight for _, weight in group])
    assert [error and error.reason for error in said] == expected
    assert total.state() == plain.state()


# ── Groups and what is summed at once ───────────────────────────────────────────────────


def of_model(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return encode({s.name: rng.normal(0, 1e-2, s.shape).astype(s.dtype) for s in MODEL})


UPDATES = [of_model(seed) for seed in range(60)]
NORMS = [norm_of(update, MODEL) for update in UPDATES]


def with_value(update: bytes, value: float) -> bytes:
    """The last value of a model's update, replaced."""
    return update[:-4] + np.float32(value).tobytes()


BAD: dict[str, tuple[bytes, Any, str | None]] = {
    "nan": (with_value(UPDATES[0], math.nan), 1, "not_finite"),
    "infinity": (with_value(UPDATES[0], math.inf), 1, "not_finite"),
    "too long": (UPDATES[0] + b"\0", 1, "bad_weights"),
    "too short": (UPDATES[0][:-1], 1, "bad_weights"),
    "norm": (with_value(UPDATES[0], 5.0), 1, "out_of_bounds"),
    "no weight": (UPDATES[0], 0, "bad_weight"),
    "truth": (UPDATES[0], True, "bad_weight"),
    "heavy": (UPDATES[0], 10**9 + 1, "bad_weight"),
    "good": (UPDATES[0], 7, None),
}


def test_what_is_summed_at_once_is_bounded_by_its_bytes() -> None:
    assert ExactSum(MODEL, fraction_bits=24).at_once == 26
    large = (TensorSpec("x", "float32", (40_000,)),)
    counters = (TensorSpec("x", "float32", (10,)), TensorSpec("n", "int64", (1_000_000,)))
    no_floats = (TensorSpec("n", "int64", (1,)),)
    for specs in (large, counters, no_floats, ()):
        assert ExactSum(specs, fraction_bits=24).at_once == 1


@pytest.mark.parametrize("count", [0, 1, 2, 25, 26, 27, 52, 53])
def test_a_group_of_any_size_is_summed_as_one_after_another(count: int) -> None:
    weights = [seed * 37 % 1000 + 1 for seed in range(count)]
    assert check_alike(MODEL, 32, UPDATES[:count], weights, 1.0) == [None] * count


@pytest.mark.parametrize("place", [0, 13, 25, 26, 27])
@pytest.mark.parametrize("name", BAD)
def test_one_bad_update_in_a_group_is_refused_alone(name: str, place: int) -> None:
    bad, weight, reason = BAD[name]
    updates, weights = UPDATES[1:30], [5] * 29
    updates[place], weights[place] = bad, weight
    said = check_alike(MODEL, 32, updates, weights, 2.0)
    assert [each and each[0] for each in said] == [
        reason if number == place else None for number in range(29)
    ]


def test_a_header_written_in_another_way_is_summed_with_the_others() -> None:
    start = int.from_bytes(UPDATES[3][4:8], "little")
    header = [(s.name, s.dtype, s.shape) for s in MODEL]
    longer = msgspec.msgpack.encode(header).replace(b"\xa1a", b"\xd9\x01a", 1)  # str 8, not fixstr
    other = b"mgw1" + len(longer).to_bytes(4, "little") + longer + UPDATES[3][8 + start :]
    updates = [*UPDATES[:3], other, *UPDATES[4:9]]
    assert check_alike(MODEL, 32, updates, [9] * 9, 2.0) == [None] * 9
    plain, found = (ExactSum(MODEL, fraction_bits=32) for _ in range(2))
    plain.add_all(UPDATES[:9], [9] * 9)
    found.add_all(updates, [9] * 9)
    assert found.state() == plain.state()


def test_a_nan_that_signals_is_refused_in_a_group_without_a_warning() -> None:
    update = UPDATES[0][:-4] + (0x7F800001).to_bytes(4, "little")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = check_alike(MODEL, 24, [UPDATES[1], update, UPDATES[2]], [1, 1, 1], 2.0)
    assert [each and each[0] for each in said] == [None, "not_finite", None]


def test_a_bound_of_nothing_or_a_missing_weight_is_our_own_mistake() -> None:
    total = ExactSum(MODEL, fraction_bits=24)
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="greater than zero"):
            total.add_all(UPDATES[:3], [1, 1, 1], delta_bound=bound)
    with pytest.raises(ValueError, match="one weight"):
        total.add_all(UPDATES[:3], [1, 1])
    assert total.count == 0


# ── The norm ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", range(7))
def test_a_norm_at_the_bound_is_judged_as_it_is_alone(place: int) -> None:
    """Three units in the last place below the bound, at it, and above."""
    worst = max(range(20), key=NORMS.__getitem__)
    bound = bounds_near(NORMS[worst])[place]
    said = check_alike(MODEL, 32, UPDATES[:20], [3] * 20, bound)
    assert [each and each[0] for each in said] == [
        "out_of_bounds" if number == worst and NORMS[worst] > bound * (1 + 1e-5) else None
        for number in range(20)
    ]


def test_the_order_in_which_squares_are_added_never_decides() -> None:
    """Where the norm over all values at once is another than that over block after block."""
    tried = 0
    for update, norm in zip(UPDATES, NORMS, strict=True):
        group = ExactSum(MODEL, fraction_bits=32)._group
        other = math.sqrt(group.measure(group.read([update]))[0])
        if other != norm:
            tried += 1
            bounds = [b for b in bounds_near(max(other, norm)) if b * (1 + 1e-5) < max(other, norm)]
            for bound in bounds:
                check_alike(MODEL, 32, [update, update], [1, 1], bound)
    assert tried > 5


# ── The bound of the sums ───────────────────────────────────────────────────────────────


def test_a_group_that_has_no_room_is_added_as_far_as_it_has() -> None:
    """A large one, one too many, and smaller ones that still fit."""
    specs = (TensorSpec("x", "float32", (2,)),)
    values = [2.0**30, 2.0**31, 2.0**31, 2.0**31, 2.0**20, 2.0**31, 2.0]
    updates = [encode({"x": np.array([value, -value], np.float32)}) for value in values]
    said = check_alike(specs, 31, updates, [1] * 7, None)
    assert [each and each[0] for each in said] == [None, None, "overflow", "overflow", None,
                                                   "overflow", None]  # fmt: skip


def test_a_group_uses_the_bound_to_the_last_bit() -> None:
    specs = (TensorSpec("x", "float32", (1,)),)
    large, rest, least = (
        encode({"x": np.array([value], np.float32)}) for value in (2.0**34, 2.0**17 - 1, 1.0)
    )
    total = ExactSum(specs, fraction_bits=0)
    assert total.add_all([large, rest], [2**29 - 1, 2**17 + 1]) == [None, None]
    assert total._bound == SUM_MAX
    (refused, nothing) = total.add_all([least, encode({"x": np.zeros(1, np.float32)})], [1, 1])
    assert refused is not None
    assert refused.reason == "overflow"
    assert nothing is None
    assert total._sums["x"].tolist() == [SUM_MAX]


@pytest.mark.parametrize("largest", [2**51 - 2**27, 2**51, 2**51 + 2**28])
@pytest.mark.parametrize("sign", [1, -1])
def test_halves_are_rounded_to_even_in_a_group_beside_the_largest_values(
    largest: int, sign: int
) -> None:
    bits = 20
    halves = [n / 2 * 2.0**-bits for n in range(-9, 10)]
    big = {"x": np.array([*halves, sign * largest * 2.0**-bits], np.float32)}
    small = {"x": np.array([*halves, 0.5], np.float32)}
    specs = specs_of(big)
    total, plain = ExactSum(specs, fraction_bits=bits), PlainSum(specs, bits)
    assert total.add_all([encode(small), encode(big), encode(small)], [7, 8, 9]) == [None] * 3
    for deltas, weight in ((small, 7), (big, 8), (small, 9)):
        plain.add(deltas, weight)
    assert total.state() == plain.state()


# ── Memory ──────────────────────────────────────────────────────────────────────────────


def test_the_memory_of_a_group_is_bounded_however_large_it_is() -> None:
    updates = UPDATES * 10
    tracemalloc.start()
    try:
        total = ExactSum(MODEL, fraction_bits=24)
        total.add_all(updates, [1] * len(updates))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total.count == 600
    assert peak < 2_500_000
