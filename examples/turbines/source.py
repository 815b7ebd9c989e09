"""Four wind turbines, ten-minute averages: how much power should this wind give?

    examples/turbines/source.py:turbine?id=1        turbine 1 of 4, every half hour of 2014
    examples/turbines/source.py:test                all four, every two hours of 2015

x: wind speed (m/s), blade pitch (°), wind vane (°), outdoor temperature (°C); y: power as a
share of the rated 2,050 kW. Where the power stays below what the model expects,
something is wrong with the turbine.

Fetch the data first: python -m examples.fetch turbines
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["test", "turbine"]

_RATED_KW = 2050.0

Arrays = tuple[NDArray[Any], NDArray[Any]]


def turbine(id: int) -> Arrays:  # noqa: A002
    """Return (x [n, 4] float32, y [n, 1] float32) of turbine `id`, 1 … 4, in 2014."""
    rows = list(_turbines().values())[id - 1]
    return _samples(rows[rows[:, 5] == 2014][::3])


def test() -> Arrays:
    """Return 2015 of all four."""
    rows = np.concatenate(list(_turbines().values()))
    return _samples(rows[rows[:, 5] == 2015][::12])


def _turbines() -> dict[str, NDArray[Any]]:
    folder = os.environ.get("MIDGE_CACHE") or Path.home() / ".cache" / "midge"
    file = Path(folder) / "turbines.npz"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run python -m examples.fetch turbines")
    with np.load(file, allow_pickle=False) as data:
        return dict(data)


def _samples(rows: NDArray[Any]) -> Arrays:
    running = rows[rows[:, 0] > 3.0]  # below 3 m/s it stands still
    return running[:, :4], running[:, 4:5] / _RATED_KW
