"""The norm that one update may have: what a single device can do to the model in a round.

Checked once, before the update's receipt. The receipt is the decision; an update read
again from the spool after a crash is not judged a second time.
"""

import math

import numpy as np
from numpy.typing import NDArray

from broker_bridge.errors import PeerError
from broker_bridge.wire.weights import Tensors

__all__ = ["check_update", "l2_norm"]

_BLOCK_VALUES = 65_536

# A device scales its delta to the bound in float32, and may land this far above it.
_ROUNDING = 1e-5


def check_update(deltas: Tensors, *, delta_bound: float) -> None:
    """Raise PeerError unless the L2 norm over all float32 tensors together is in bounds.

    Reasons: `out_of_bounds`; `not_finite` when a value is NaN or infinite.
    """
    if not delta_bound > 0:
        raise ValueError("a delta bound is greater than zero")
    norm = l2_norm(deltas)
    if not math.isfinite(norm):
        raise PeerError("not_finite", "an update holds NaN or infinity")
    if norm > delta_bound * (1 + _ROUNDING):
        raise PeerError(
            "out_of_bounds", f"an update's norm is {norm:.6g}; this round allows {delta_bound:.6g}"
        )


def l2_norm(deltas: Tensors) -> float:
    """The L2 norm over all float32 tensors together; integer tensors do not count."""
    floats = (array for array in deltas.values() if array.dtype.kind == "f")
    return math.sqrt(sum(_squares(array) for array in floats))


def _squares(array: NDArray[np.float32]) -> float:
    """The sum of squares, in float64: the square of no float32 overflows there."""
    flat = array.reshape(-1)
    total = 0.0
    for start in range(0, flat.size, _BLOCK_VALUES):
        block = flat[start : start + _BLOCK_VALUES].astype(np.float64)
        total += float(np.sum(np.square(block, out=block)))
    return total
