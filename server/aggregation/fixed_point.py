"""How a value becomes fixed point: q = rint(Δ · 2^F), the same on any machine."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["FixedPoint"]


class FixedPoint:
    """How Δ becomes q = rint(Δ · 2^F), an int64 in the same eight bytes."""

    def __init__(self, fraction_bits: int) -> None:
        self.scale = 2.0**fraction_bits
        self._anchor = np.float64(1.5 * 2**52 / self.scale)
        self._anchor_bits = self._anchor.view(np.int64)

    def convert(self, values: NDArray[np.float64], largest: int) -> NDArray[np.int64]:
        """Replace values by their q, of which none is larger than `largest`."""
        fixed = values.view(np.int64)
        if largest < 2**51:
            # Beside 1.5 · 2^(52-F) the last place of a float64 is worth 2^-F. So the addition
            # rounds as rint does, and its bits are q more than those of the anchor itself.
            np.add(values, self._anchor, out=values)
            np.subtract(fixed, self._anchor_bits, out=fixed)
        else:  # the same in more time: NumPy casts to int64 one by one
            np.multiply(values, self.scale, out=values)
            np.rint(values, out=fixed, casting="unsafe")
        return fixed
