"""Where will this aircraft be in a minute? One aircraft's own telemetry, one device.

    examples/aircraft/source.py:aircraft?id=0       a minute of history, every 10 s
    examples/aircraft/source.py:test                aircraft that no device is

x [7, 4]: altitude against now (1,000 ft), speed (500 kt), vertical rate (1,000 ft/min) and
turn against now (90°), over the last minute. y: the change of altitude in the next minute
(1,000 ft). Every fifth aircraft is kept for testing.

Fetch the data first: python -m examples.fetch aircraft
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["aircraft", "count", "test"]

_ROWS_MIN = 100
_PAST = 7  # rows of 10 s, now included
_AHEAD = 6

Arrays = tuple[NDArray[Any], NDArray[Any]]


def aircraft(id: int) -> Arrays:  # noqa: A002
    """Return (x [n, 7, 4] float32, y [n, 1] float32) of training aircraft `id`."""
    flights = _flights()
    return _samples(flights[[n for n in range(len(flights)) if n % 5 != 4][id]])


def count() -> int:
    """Return how many training aircraft there are."""
    return sum(n % 5 != 4 for n in range(len(_flights())))


def test() -> Arrays:
    """Return the aircraft that no device is."""
    parts = [_samples(flight) for flight in _flights()[4::5]]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _flights() -> list[Arrays]:
    """Return (seconds, values) of each aircraft with enough rows and enough samples."""
    folder = os.environ.get("MIDGE_CACHE") or Path.home() / ".cache" / "midge"
    file = Path(folder) / "aircraft.npz"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run python -m examples.fetch aircraft")
    with np.load(file, allow_pickle=False) as data:
        number, second, value = data["aircraft"], data["second"], data["value"]
    whole = np.isfinite(value).all(1)
    number, second, value = number[whole], second[whole], value[whole]
    borders = np.flatnonzero(np.diff(number)) + 1
    parts = zip(np.split(second, borders), np.split(value, borders), strict=True)
    flights = [part for part in parts if len(part[0]) >= _ROWS_MIN]
    return [flight for flight in flights if len(_samples(flight)[1]) >= 20]


def _samples(flight: Arrays) -> Arrays:
    second, value = flight
    length = _PAST + _AHEAD
    starts = np.arange(len(second) - length + 1)
    steady = second[starts + length - 1] - second[starts] == 10.0 * (length - 1)
    windows = value[starts[steady][:, None] + np.arange(length)]
    past, now = windows[:, :_PAST], windows[:, _PAST - 1 : _PAST]
    turn = (past[:, :, 3] - now[:, :, 3] + 180.0) % 360.0 - 180.0
    x = np.stack(
        [
            (past[:, :, 0] - now[:, :, 0]) / 1000.0,
            past[:, :, 1] / 500.0,
            past[:, :, 2] / 1000.0,
            turn / 90.0,
        ],
        axis=2,
    )
    return x.astype(np.float32), (windows[:, -1, :1] - now[:, 0, :1]) / np.float32(1000.0)
