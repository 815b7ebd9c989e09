"""Ten people's smartwatch recordings of shoulder exercises, one person one device.

    examples/wearables/source.py:person?id=3          what person 3's device holds
    examples/wearables/source.py:people?ids=9,10      people put together, for testing

A sample is 2 s: 50 rows at 25 Hz of acceleration (ax ay az) and rotation (wx wy wz);
a new one starts every second. The label is the exercise, 0 … 6. A watch on the left
wrist is turned into its mirror image on the right: a watch knows which wrist it is on.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXERCISES", "people", "person"]

EXERCISES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")

_FILE = Path(__file__).with_name("wearables.npz")
_WINDOW_ROWS = 50
_HOP_ROWS = 25
# A mirror turns round one acceleration, and the rotations about the two other axes.
_MIRROR = np.array([-1, 1, 1, 1, -1, -1], np.float32)

Arrays = tuple[NDArray[Any], NDArray[Any]]


def person(id: int) -> Arrays:  # noqa: A002
    """Return (x [n, 50, 6] float32, y [n] int32) of person `id`, 1 … 10."""
    return people(str(id))


def people(ids: str | int) -> Arrays:
    """Return the samples of several people, as in "9,10"."""
    wanted = {int(text) for text in str(ids).split(",")}
    with np.load(_FILE, allow_pickle=False) as data:
        unknown = wanted - set(data["subject"].tolist())
        if unknown:
            raise ValueError(f"there is no person {min(unknown)}; people are 1 … 10")
        signal = data["signal"].astype(np.float32)
        starts = data["start"]
        windows, labels = [], []
        for recording in np.flatnonzero(np.isin(data["subject"], list(wanted))):
            cut = _windows(signal[starts[recording] : starts[recording + 1]])
            windows.append(cut * _MIRROR if data["side"][recording] == 0 else cut)
            labels.append(np.full(len(cut), data["exercise"][recording], np.int32))
    return np.concatenate(windows), np.concatenate(labels)


def _windows(recording: NDArray[Any]) -> NDArray[Any]:
    starts = range(0, len(recording) - _WINDOW_ROWS + 1, _HOP_ROWS)
    return np.stack([recording[start : start + _WINDOW_ROWS] for start in starts])
