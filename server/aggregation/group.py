"""Small updates side by side, a row each: what a call of NumPy costs is paid once for all rows.

Bounded: no more rows than make a quarter of a mebibyte of updates, however many there are.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from broker_bridge.wire.weights import Form

__all__ = ["Group"]

_UPDATE_BYTES = 262_144  # in one group; each of its two temporaries is twice as large
_ROWS_MIN = 6  # fewer of larger updates take longer together than alone: the cache is too small
_FLOAT32 = np.dtype("<f4")


class Group:
    """Room for the float32 values of a few updates of one form, as float64."""

    def __init__(self, form: Form) -> None:
        self._form = form
        floats = sum(count for _, count in form.floats)
        rows = _UPDATE_BYTES // form.nbytes if floats else 0
        self.rows_max = rows if rows >= _ROWS_MIN else 1
        """How many updates there is room for; 1 where a group would save nothing."""
        self._values, self._squares = np.empty((2, rows if self.rows_max > 1 else 0, floats))

    def read(self, updates: Sequence[bytes]) -> NDArray[np.float64]:
        """The float32 values of updates, (update, value). Each conforms to the form."""
        values: NDArray[np.float64] = self._values[: len(updates)]
        data, step, first = b"".join(updates), self._form.nbytes, 0
        with np.errstate(invalid="ignore"):  # a NaN that signals is found as any other is
            for start, count in self._form.floats:
                shape, strides = (len(updates), count), (step, _FLOAT32.itemsize)
                found: NDArray[np.float32] = np.ndarray(shape, _FLOAT32, data, start, strides)
                values[:, first : first + count] = found
                first += count
        return values

    def measure(self, values: NDArray[np.float64]) -> tuple[float, list[float]]:
        """The largest ΣΔ² of what was read, and max|Δ| of each row.

        The first is NaN or infinite when a value is. The others are exact: the square of a
        float32 is a float64, and sqrt rounds rightly.
        """
        squares = np.square(values, out=self._squares[: len(values)])
        sums = np.add.reduce(squares, axis=1)
        peaks = np.sqrt(np.maximum.reduce(squares, axis=1))
        return float(np.maximum.reduce(sums)), peaks.tolist()
