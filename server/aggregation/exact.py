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
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import weights
from broker_bridge.wire.weights import Tensors, TensorSpec

__all__ = ["SUM_MAX", "ExactSum"]

SUM_MAX = 2**63 - 1
_BLOCK_VALUES = 65_536  # temporaries of half a mebibyte, whatever the size of a tensor
_STATE = struct.Struct("<4sB3xQQQ")  # magic, fraction bits, count, weight, bound
_MAGIC = b"mgs1"
_DIGEST_BYTES = 32


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
        self._sums = {
            spec.name: np.zeros(spec.shape, np.int64)
            for spec in self.specs
            if spec.dtype == "float32"
        }

    def add(self, deltas: Tensors, weight: int) -> None:
        """Add one update: all of it, or, when a PeerError is raised, nothing.

        `deltas` has exactly the specs' tensors, in their order. Reasons: `bad_weight`,
        `wrong_shape` (or name, or dtype), `not_finite`, `overflow`.
        """
        if isinstance(weight, bool) or not isinstance(weight, int):
            raise PeerError("bad_weight", "a weight is a whole number")
        if not 1 <= weight <= self.weight_max:
            raise PeerError("bad_weight", f"a weight is 1 to {self.weight_max}, not {weight}")
        weights.check(deltas, self.specs)
        bound = self._bound + weight * self._largest(deltas)
        if bound > SUM_MAX or self.weight + weight > SUM_MAX:
            raise PeerError("overflow", "the sum would no longer be exact with this update")
        for name, sums in self._sums.items():
            self._add_tensor(sums, deltas[name], weight)
        self._bound = bound
        self.count += 1
        self.weight += weight

    def remove(self, deltas: Tensors, weight: int) -> None:
        """Take an update out that was added: every bit is then as if it had never come."""
        weights.check(deltas, self.specs)
        for name, sums in self._sums.items():
            self._add_tensor(sums, deltas[name], -weight)
        self._bound -= weight * self._largest(deltas)
        self.count -= 1
        self.weight -= weight

    def _largest(self, deltas: Tensors) -> int:
        """max|q| over all tensors, exactly: rint is monotone, so it is q of max|Δ|."""
        peaks = [0.0]
        for name in self._sums:
            array = deltas[name]
            if array.size:
                # NaN goes through max and min; infinity is one of them.
                low, high = float(array.min()), float(array.max())
                if not (np.isfinite(low) and np.isfinite(high)):
                    raise PeerError("not_finite", f"tensor {name!r} holds NaN or infinity")
                peaks += [-low, high]
        return int(np.rint(max(peaks) * 2.0**self.fraction_bits))

    def _add_tensor(self, sums: NDArray[np.int64], delta: NDArray[np.float32], weight: int) -> None:
        scale = 2.0**self.fraction_bits
        into, flat = sums.reshape(-1), delta.reshape(-1)
        for start in range(0, flat.size, _BLOCK_VALUES):
            block = slice(start, start + _BLOCK_VALUES)
            # Exact but for the rint: a float32 times a power of two fits a float64.
            scaled = np.multiply(flat[block], scale, dtype=np.float64)
            fixed = np.rint(scaled, out=scaled).astype(np.int64)
            fixed *= weight
            into[block] += fixed

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """Σ weight · Δ / Σ weight of each float32 tensor: float64 throughout, float32 at the end.

        One conversion, one division and one scaling by a power of two, each of them exactly
        defined by IEEE 754: the same sums give the same bits on any machine.
        """
        if not self.weight:
            raise ValueError("there is no mean of no updates")
        return {name: self._mean_of(sums) for name, sums in self._sums.items()}

    def _mean_of(self, sums: NDArray[np.int64]) -> NDArray[np.float32]:
        mean = np.empty(sums.shape, np.float32)
        into, flat = mean.reshape(-1), sums.reshape(-1)
        for start in range(0, flat.size, _BLOCK_VALUES):
            block = slice(start, start + _BLOCK_VALUES)
            values = flat[block].astype(np.float64)
            values /= float(self.weight)
            values *= 2.0**-self.fraction_bits
            into[block] = values
        return mean

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
