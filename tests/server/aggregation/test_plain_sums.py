"""Exact sums held, bit for bit, against sums in Python's integers, tensor by tensor.

Any specs, with integer, bool, empty and scalar tensors between the floats; any order, what
was taken out again, checkpoints on the way, and values up to where no sum is exact any more.
"""

import hashlib
import math
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from broker_bridge.wire.weights import TensorSpec, decode, encode
from server.aggregation.exact import SUM_MAX, ExactSum

Deltas = dict[str, NDArray[Any]]

DTYPES = st.sampled_from(["float32", "float32", "float32", "int32", "int64", "uint8", "bool"])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
SPECS = st.lists(st.tuples(DTYPES, SHAPES), max_size=6).map(
    lambda found: tuple(
        TensorSpec("t" * place, dtype, shape) for place, (dtype, shape) in enumerate(found, 1)
    )
)


class PlainSum:
    """The sums as docs/protocol.md defines them, with nothing done to be fast."""

    def __init__(self, specs: tuple[TensorSpec, ...], bits: int) -> None:
        self.floats = [spec for spec in specs if spec.dtype == "float32"]
        self.bits = bits
        self.sums = {spec.name: [0] * spec.size for spec in self.floats}
        self.count = self.weight = self.bound = 0

    def fixed(self, deltas: Deltas) -> dict[str, list[int]]:
        """q of every value; to scale by a power of two is exact, and Python rounds as IEEE does."""
        return {
            spec.name: [
                round(math.ldexp(value, self.bits))
                for value in deltas[spec.name].reshape(-1).tolist()
            ]
            for spec in self.floats
        }

    def largest(self, deltas: Deltas) -> int:
        return max((abs(q) for each in self.fixed(deltas).values() for q in each), default=0)

    def has_room(self, deltas: Deltas, weight: int) -> bool:
        return self.bound + weight * self.largest(deltas) <= SUM_MAX

    def add(self, deltas: Deltas, weight: int, sign: int = 1) -> None:
        for name, found in self.fixed(deltas).items():
            self.sums[name] = [
                total + sign * weight * q for total, q in zip(self.sums[name], found, strict=True)
            ]
        self.bound += sign * weight * self.largest(deltas)
        self.count += sign
        self.weight += sign * weight

    def state(self) -> bytes:
        tensors = {s.name: np.array(self.sums[s.name], np.int64) for s in self.floats}
        shaped = {s.name: tensors[s.name].reshape(s.shape) for s in self.floats}
        head = struct.pack("<4sB3xQQQ", b"mgs1", self.bits, self.count, self.weight, self.bound)
        body = head + encode(shaped)
        return body + hashlib.sha256(body).digest()

    def mean(self) -> Deltas:
        found = {
            name: [float(total) / float(self.weight) * 2.0**-self.bits for total in totals]
            for name, totals in self.sums.items()
        }
        return {s.name: np.array(found[s.name], np.float32).reshape(s.shape) for s in self.floats}


def filled(data: st.DataObject, specs: tuple[TensorSpec, ...], bits: int) -> Deltas:
    """Values near 1, and near the last place, 2^51 and 2^63 of the fixed point."""
    sides = [bits, bits, 0, bits - 51, bits - 62]
    values = st.builds(
        lambda value, power: float(np.float32(math.ldexp(value, -power))),
        st.floats(-4, 4, width=32) | st.integers(-9, 9).map(lambda halves: halves / 2),
        st.sampled_from(sides),
    )
    return {
        spec.name: data.draw(
            hnp.arrays(
                spec.dtype,
                spec.shape,
                elements=values
                if spec.dtype == "float32"
                else hnp.from_dtype(np.dtype(spec.dtype)),
            )
        )
        for spec in specs
    }


@settings(deadline=None)
@given(st.data(), SPECS, st.integers(0, 48))
def test_any_sum_is_the_plain_one_to_the_last_bit(
    data: st.DataObject, specs: tuple[TensorSpec, ...], bits: int
) -> None:
    total, plain = ExactSum(specs, fraction_bits=bits), PlainSum(specs, bits)
    inside: list[tuple[Deltas, int]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        deltas, weight = filled(data, specs, bits), data.draw(st.integers(1, 10**6))
        if plain.has_room(deltas, weight):
            total.add(encode(deltas), weight, delta_bound=math.inf)
            plain.add(deltas, weight)
            inside.append((deltas, weight))
        else:
            with pytest.raises(PeerError, match="no longer be exact"):
                total.add(encode(deltas), weight)
        if inside and data.draw(st.booleans()):
            gone = inside.pop(data.draw(st.integers(0, len(inside) - 1)))
            total.remove(encode(gone[0]), gone[1])
            plain.add(*gone, sign=-1)
        if data.draw(st.booleans()):
            total = ExactSum.from_state(total.state(), specs, fraction_bits=bits)
    assert total.state() == plain.state()
    assert total.digest() == plain.state()[-32:]
    if inside:
        found, wanted = total.mean(), plain.mean()
        assert list(found) == list(wanted)
        assert all(found[name].shape == wanted[name].shape for name in wanted)
        assert encode(found) == encode(wanted)


@pytest.mark.parametrize("middle", ["int64", "bool", "float32"])
def test_a_sum_of_many_blocks_is_the_plain_one(middle: str) -> None:
    """Blocks end within tensors, and begin where a bool has put the floats off their places."""
    specs = (
        TensorSpec("first", "float32", (65_535,)),
        TensorSpec("middle", middle, (3,)),
        TensorSpec("second", "float32", (2, 40_000)),
    )
    total, plain, rng = ExactSum(specs, fraction_bits=30), PlainSum(specs, 30), _rng()
    for weight in (3, 1000):
        deltas: Deltas = {
            spec.name: rng.normal(0, 1e-3, spec.shape).astype(spec.dtype) for spec in specs
        }
        total.add(encode(deltas), weight)
        plain.add(deltas, weight)
    assert total.state() == plain.state()


def _rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize("largest", [2**51 - 2**27, 2**51, 2**51 + 2**28])
@pytest.mark.parametrize("sign", [1, -1])
def test_halves_are_rounded_to_even_beside_the_largest_values(largest: int, sign: int) -> None:
    """2^51 is where a sum ceases to round as rint does."""
    bits = 20
    halves = [n / 2 * 2.0**-bits for n in range(-9, 10)]
    deltas = {"x": np.array([*halves, sign * largest * 2.0**-bits], np.float32)}
    specs = (TensorSpec("x", "float32", (20,)),)
    total, plain = ExactSum(specs, fraction_bits=bits), PlainSum(specs, bits)
    total.add(encode(deltas), 7)
    plain.add(deltas, 7)
    assert plain.largest(deltas) == largest
    assert total.state() == plain.state()


def test_a_nan_that_signals_is_refused_like_any_other_and_without_a_warning() -> None:
    specs = (TensorSpec("a", "float32", (2,)), TensorSpec("b", "float32", (3,)))
    good = encode({s.name: np.zeros(s.shape, np.float32) for s in specs})
    update = good[:-4] + (0x7F800001).to_bytes(4, "little")
    total = ExactSum(specs, fraction_bits=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PeerError, match="'b' holds NaN") as caught:
            total.add(update, 1, delta_bound=1.0)
    assert caught.value.reason == "not_finite"
    with pytest.raises(PeerError) as said:
        decode(update)
    assert str(said.value) == str(caught.value)
