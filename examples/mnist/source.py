"""MNIST on a hundred devices, as in McMahan et al. 2017 (arXiv 1602.05629), section 3.

    examples/mnist/source.py:device?id=1                 600 digits, drawn at random
    examples/mnist/source.py:device?id=1&split=shards    two shards of 300 digits, by label
    examples/mnist/source.py:test                        the 10,000 test digits

Fetch the data first: python -m examples.fetch mnist
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["device", "test"]

_DEVICES = 100

Arrays = tuple[NDArray[Any], NDArray[Any]]


def device(id: int, split: str = "iid", seed: int = 1) -> Arrays:  # noqa: A002
    """Return (x [600, 784] float32, y [600] int32) of device `id`, 1 … 100."""
    x, y = _part("train")
    draw = np.random.default_rng(seed)
    if split == "iid":
        mine = np.array_split(draw.permutation(len(y)), _DEVICES)[id - 1]
    else:
        shards = np.array_split(np.argsort(y, kind="stable"), 2 * _DEVICES)
        dealt = draw.permutation(len(shards))[2 * (id - 1) : 2 * id]
        mine = np.concatenate([shards[s] for s in dealt])
    return _scaled(x[mine]), y[mine].astype(np.int32)


def test() -> Arrays:
    """Return the test digits."""
    x, y = _part("test")
    return _scaled(x), y.astype(np.int32)


def _part(name: str) -> Arrays:
    folder = os.environ.get("MIDGE_CACHE") or Path.home() / ".cache" / "midge"
    file = Path(folder) / "mnist.npz"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run python -m examples.fetch mnist")
    with np.load(file, allow_pickle=False) as data:
        return data[f"{name}_images"], data[f"{name}_labels"]


def _scaled(images: NDArray[Any]) -> NDArray[Any]:
    return images.reshape(len(images), -1).astype(np.float32) / 255.0
