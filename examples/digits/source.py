"""Handwritten digits, dealt to ten devices so that each knows two or three of them.

    examples/digits/source.py:device?id=3       what device 3 of 10 holds
    examples/digits/source.py:test              every fifth digit, which no device has

The deal is McMahan's (2017): sort by label, cut into 20 shards, two shards for each device.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["device", "test"]

_FILE = Path(__file__).with_name("digits.npz")
_DEVICES = 10
_SHARDS_EACH = 2

Arrays = tuple[NDArray[Any], NDArray[Any]]


def device(id: int) -> Arrays:  # noqa: A002
    """Return (x [n, 8, 8, 1] float32, y [n] int32) of device `id`, 1 … 10."""
    if not 1 <= id <= _DEVICES:
        raise ValueError(f"there is no device {id}; devices are 1 … {_DEVICES}")
    x, y = _digits(testing=False)
    order = np.argsort(y, kind="stable")
    shards = np.array_split(order, _DEVICES * _SHARDS_EACH)
    dealt = np.random.default_rng(1).permutation(len(shards))
    mine = np.concatenate([shards[s] for s in dealt[id - 1 :: _DEVICES]])
    return x[mine], y[mine]


def test() -> Arrays:
    """Return the digits that no device has."""
    return _digits(testing=True)


def _digits(*, testing: bool) -> Arrays:
    with np.load(_FILE, allow_pickle=False) as data:
        x = data["image"].astype(np.float32)[..., None] / 16.0
        y = data["label"].astype(np.int32)
    chosen = (np.arange(len(y)) % 5 == 4) == testing
    return x[chosen], y[chosen]
