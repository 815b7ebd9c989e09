"""The norm that one update may have: what a single device can do to the model in a round.

Checked once, before the update's receipt. The receipt is the decision; an update read
again from the spool after a crash is not judged a second time.
"""

from broker_bridge.errors import PeerError

__all__ = ["check_norm", "is_well_within"]

# A device scales its delta to the bound in float32, and may land this far above it.
_ROUNDING = 1e-5
_ORDER = 1e-9  # far more than the order in which 65,536 squares are added can change a norm


def check_norm(norm: float, *, delta_bound: float) -> None:
    """Raise PeerError `out_of_bounds` unless an update's norm is within the bound.

    `norm` is the L2 norm over all float32 tensors together; integer tensors do not count.
    """
    if not delta_bound > 0:
        raise ValueError("a delta bound is greater than zero")
    if norm > delta_bound * (1 + _ROUNDING):
        raise PeerError(
            "out_of_bounds", f"an update's norm is {norm:.6g}; this round allows {delta_bound:.6g}"
        )


def is_well_within(norm: float, delta_bound: float) -> bool:
    """Whether `check_norm` passes this norm, and would if it had been added in another order."""
    return delta_bound > 0 and norm <= delta_bound * (1 + _ROUNDING) * (1 - _ORDER)
