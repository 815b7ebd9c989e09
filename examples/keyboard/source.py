"""Next words: each device holds what one of Shakespeare's roles says.

    examples/keyboard/source.py:role?id=0       the first four fifths of a role's words
    examples/keyboard/source.py:test            the last fifth of every role's words

A sample is ten words and the one that follows; only words of the vocabulary are asked for.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["role", "roles", "test"]

_FILE = Path(__file__).with_name("keyboard.npz")
_WORDS = 10
_OTHER = 1

Arrays = tuple[NDArray[Any], NDArray[Any]]


def roles() -> list[str]:
    """Return the names of the roles, by number."""
    with np.load(_FILE, allow_pickle=False) as data:
        return [str(name) for name in data["role"]]


def role(id: int) -> Arrays:  # noqa: A002
    """Return (x [n, 10] int32, y [n] int32) of role `id`."""
    return _samples([id], testing=False)


def test() -> Arrays:
    """Return the last fifth of every role."""
    return _samples(range(len(roles())), testing=True)


def _samples(ids: Any, *, testing: bool) -> Arrays:
    contexts, following = [], []
    with np.load(_FILE, allow_pickle=False) as data:
        tokens, start = data["token"].astype(np.int32), data["start"]
    for number in ids:
        words = tokens[start[number] : start[number + 1]]
        border = len(words) * 4 // 5
        words = words[border:] if testing else words[:border]
        windows = np.lib.stride_tricks.sliding_window_view(words, _WORDS + 1)
        windows = windows[windows[:, -1] != _OTHER]
        contexts.append(windows[:, :-1])
        following.append(windows[:, -1])
    return np.concatenate(contexts), np.concatenate(following)
