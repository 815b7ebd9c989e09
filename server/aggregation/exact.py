"""Exact streaming weighted sums of updates (docs/protocol.md, "Exact sums").

Each value becomes fixed point, q = rint(Δ · 2^F), and is added, times its integer
weight, to an int64. Integer addition is associative, so the sums are the same bits in
any order, after any crash and any repeat. Σ weight · max|q| is kept beside them: no
sum can be larger, so while it fits an int64, nothing overflows.

Only float32 tensors are summed. A model's integer tensors (counters, vocabularies) must
be present in an update, in their place and shape, and are otherwise ignored: they have no
mean. Memory is 8 bytes per float32 value, however many updates are added.

What is lost is what lies below 2^-F: a value is off by at most 2^-(F+1).
"""

import hashlib
import itertools
import math
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import weights
from broker_bridge.wire.weights import Form, TensorSpec
from server.aggregation.bounds import check_norm, is_well_within
from server.aggregation.fixed_point import FixedPoint
from server.aggregation.group import Group

__all__ = ["SUM_MAX", "ExactSum"]

SUM_MAX = 2**63 - 1
_BLOCK_VALUES = 65_536  # two temporaries of half a mebibyte, however large a model is
_STATE = struct.Struct("<4sB3xQQQ")  # magic, fraction bits, count, weight, bound
_MAGIC = b"mgs1"
_DIGEST_BYTES = 32
_FLOAT32 = np.dtype("<f4")
_Value = TypeVar("_Value", np.int64, np.float32)


@dataclass(frozen=True)
class _Block:
    """A stretch of float32 values: where it begins in an update, its sums, and room to work in.

    All blocks work in the same room: `values` holds what was read last, whichever read it.
    """

    start: int
    sums: NDArray[np.int64]
    values: NDArray[np.float64]
    squares: NDArray[np.float64]

    def measure(self, update: bytes) -> tuple[float, float]:
        """Read the block; return ΣΔ² and max|Δ|. Raises PeerError `not_finite`."""
        found = np.frombuffer(update, _FLOAT32, self.sums.size, self.start)
        low, high = float(np.minimum.reduce(found)), float(np.maximum.reduce(found))
        if not math.isfinite(high - low):  # NaN goes through both; infinity is one of them
            weights.decode(update)  # refuses it, and says in which tensor
        self.values[...] = found
        np.square(self.values, out=self.squares)  # in float64, where that of no float32 overflows
        return float(np.add.reduce(self.squares)), max(-low, high)

    def read(self, update: bytes) -> None:
        """Read the block again."""
        self.values[...] = np.frombuffer(update, _FLOAT32, self.sums.size, self.start)

    def add(self, fixed: NDArray[np.int64], weight: int) -> None:
        """Add weight · q to the sums."""
        np.multiply(fixed, weight, out=fixed)
        np.add(self.sums, fixed, out=self.sums)


class ExactSum:
    """Σ weight · Δ over the updates of one round."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        *,
        fraction_bits: int,
        weight_max: int = LIMITS.examples_max,
    ) -> None:
        if not 0 <= fraction_bits <= 48:
            raise ValueError("fraction bits are 0 to 48")
        self.specs = tuple(specs)
        self.fraction_bits = fraction_bits
        self.weight_max = weight_max
        self.count = 0
        self.weight = 0
        self._bound = 0
        self._point = FixedPoint(fraction_bits)
        self._form = Form(self.specs)
        self._flat = np.zeros(sum(count for _, count in self._form.floats), np.int64)
        self._sums = self._by_name(self._flat)
        self._blocks = self._cut()
        self._group = Group(self._form)

    @property
    def at_once(self) -> int:
        """How many updates of this model `add_all` sums at once: 1 when they are large."""
        return self._group.rows_max

    def _by_name(self, flat: NDArray[_Value]) -> dict[str, NDArray[_Value]]:
        """The float32 tensors in `flat`, which holds them end to end: views, not copies."""
        floats = [spec for spec in self.specs if spec.dtype == "float32"]
        parts = _parts(flat, [spec.size for spec in floats])
        return {s.name: part.reshape(s.shape) for s, part in zip(floats, parts, strict=True)}

    def _cut(self) -> list[_Block]:
        """The blocks of an update: as much as lies together in it, and as there is room for."""
        stretches = [
            (start + first * _FLOAT32.itemsize, min(_BLOCK_VALUES, count - first))
            for start, count in self._form.floats
            for first in range(0, count, _BLOCK_VALUES)
        ]
        sizes = [size for _, size in stretches]
        values, squares = np.empty((2, max(sizes, default=0)))
        return [
            _Block(start, sums, values[:size], squares[:size])
            for (start, size), sums in zip(stretches, _parts(self._flat, sizes), strict=True)
        ]

    def add(self, update: bytes, weight: int, *, delta_bound: float | None = None) -> None:
        """Add one update: all of it, or, when a PeerError is raised, nothing.

        `update` is `weights.encode` of exactly the specs' tensors, in their order. Reasons: what
        `weights.decode` and `check` raise; `out_of_bounds`, when `delta_bound` is given;
        `bad_weight`; `overflow`.
        """
        update = self._form.conform(update)
        norm, largest = self._measure(update)
        if delta_bound is not None:
            check_norm(norm, delta_bound=delta_bound)
        self._check_weight(weight)
        bound = self._bound + weight * largest
        if bound > SUM_MAX or self.weight + weight > SUM_MAX:
            raise PeerError("overflow", "the sum would no longer be exact with this update")
        self._add_measured(update, weight, largest)
        self._bound = bound
        self.count += 1
        self.weight += weight

    def add_all(
        self, updates: Sequence[bytes], weights: Sequence[int], *, delta_bound: float | None = None
    ) -> list[PeerError | None]:
        """What `add` would do with each in turn, to the last bit, in less time for small ones.

        Returns what `add` would raise, or None, for each.
        """
        if len(updates) != len(weights):
            raise ValueError("each update has one weight")
        refused: list[PeerError | None] = []
        for first in range(0, len(updates), self.at_once):
            part = slice(first, first + self.at_once)
            some, theirs = updates[part], weights[part]
            if len(some) > 1 and self._add_rows(some, theirs, delta_bound):
                refused += [None] * len(some)
            else:
                pairs = zip(some, theirs, strict=True)
                refused += [self._refusal(update, w, delta_bound) for update, w in pairs]
        return refused

    def _refusal(self, update: bytes, weight: int, delta_bound: float | None) -> PeerError | None:
        """Add one; return why not, if so."""
        try:
            self.add(update, weight, delta_bound=delta_bound)
        except PeerError as error:
            return error
        return None

    def _add_rows(
        self, updates: Sequence[bytes], weights: Sequence[int], delta_bound: float | None
    ) -> bool:
        """Add all of these, or none and say False when it is not plain that `add` takes them all.

        A refusal is `add`'s alone, and so is a norm so near the bound that the order in which
        its squares are added could decide.
        """
        try:
            for weight in weights:
                self._check_weight(weight)
            values = self._group.read([self._form.conform(each) for each in updates])
        except PeerError:
            return False
        squares, peaks = self._group.measure(values)
        if not math.isfinite(squares):
            return False
        if delta_bound is not None and not is_well_within(math.sqrt(squares), delta_bound):
            return False
        largest = [round(peak * self._point.scale) for peak in peaks]
        bound = self._bound + sum(map(operator.mul, weights, largest))
        weight = self.weight + sum(weights)
        if bound > SUM_MAX or weight > SUM_MAX:
            return False
        fixed = self._point.convert(values, max(largest))
        self._flat += np.einsum("u,uv->v", np.array(weights, np.int64), fixed)
        self._bound = bound
        self.count += len(updates)
        self.weight = weight
        return True

    def remove(self, update: bytes, weight: int) -> None:
        """Take an update out that was added: every bit is then as if it had never come.

        Raises PeerError, and takes out nothing, when it is none that can have been added.
        """
        update = self._form.conform(update)
        _, largest = self._measure(update)
        self._add_measured(update, -weight, largest)
        self._bound -= weight * largest
        self.count -= 1
        self.weight -= weight

    def _check_weight(self, weight: int) -> None:
        if isinstance(weight, bool) or not isinstance(weight, int):
            raise PeerError("bad_weight", "a weight is a whole number")
        if not 1 <= weight <= self.weight_max:
            raise PeerError("bad_weight", f"a weight is 1 to {self.weight_max}, not {weight}")

    def _measure(self, update: bytes) -> tuple[float, int]:
        """The L2 norm over all float32 values, and max|q|: rint is monotone, so q of max|Δ|."""
        squares = largest = 0.0
        for block in self._blocks:
            found, peak = block.measure(update)
            squares += found
            largest = max(largest, peak)
        return math.sqrt(squares), round(largest * self._point.scale)

    def _add_measured(self, update: bytes, weight: int, largest: int) -> None:
        for block in reversed(self._blocks):
            if block is not self._blocks[-1]:  # that one was measured last, and is read already
                block.read(update)
            block.add(self._point.convert(block.values, largest), weight)

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """Σ weight · Δ / Σ weight of each float32 tensor: float64 throughout, float32 at the end.

        One conversion, one division and one scaling by a power of two, each of them exactly
        defined by IEEE 754: the same sums give the same bits on any machine.
        """
        if not self.weight:
            raise ValueError("there is no mean of no updates")
        mean = np.empty(self._flat.size, np.float32)
        for first in range(0, mean.size, _BLOCK_VALUES):
            place = slice(first, first + _BLOCK_VALUES)
            values = self._flat[place].astype(np.float64)
            values /= float(self.weight)
            values *= 1 / self._point.scale
            mean[place] = values
        return self._by_name(mean)

    def digest(self) -> bytes:
        """SHA-256 over everything that the result depends on, 32 bytes."""
        return hashlib.sha256(self._body()).digest()

    def state(self) -> bytes:
        """The sums as bytes, for a checkpoint; `from_state` goes on from there."""
        body = self._body()
        return body + hashlib.sha256(body).digest()

    def _body(self) -> bytes:
        head = _STATE.pack(_MAGIC, self.fraction_bits, self.count, self.weight, self._bound)
        return head + weights.encode(self._sums)

    @classmethod
    def from_state(
        cls,
        state: bytes,
        specs: Sequence[TensorSpec],
        *,
        fraction_bits: int,
        weight_max: int = LIMITS.examples_max,
    ) -> "ExactSum":
        """Go on from a `state`. Raises LocalError when it is damaged or of another round."""
        body, digest = state[:-_DIGEST_BYTES], state[-_DIGEST_BYTES:]
        if len(body) < _STATE.size or hashlib.sha256(body).digest() != digest:
            raise LocalError("a checkpoint of the sums is damaged; delete it and add them again")
        magic, bits, count, weight, bound = _STATE.unpack_from(body)
        self = cls(specs, fraction_bits=fraction_bits, weight_max=weight_max)
        sums = weights.decode(body[_STATE.size :]) if magic == _MAGIC else {}
        if bits != fraction_bits or weights.specs_of(sums) != weights.specs_of(self._sums):
            raise LocalError("a checkpoint of the sums is of another model; delete it")
        for name, values in sums.items():
            self._sums[name][...] = values
        self.count, self.weight, self._bound = count, weight, bound
        return self


def _parts(flat: NDArray[_Value], sizes: Sequence[int]) -> list[NDArray[_Value]]:
    """`flat`, cut into views of these sizes."""
    ends = itertools.accumulate(sizes)
    return [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
