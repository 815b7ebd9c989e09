"""The frozen bytes are watched: each file of them by a test, and each value in it.

They say what was shipped, so they are added to and never changed. Whether a change would be
noticed is tried, in the campaign, on a copy of the project: one value after the other is altered
there, and the tests that read its file must fail.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
VECTORS = sorted((ROOT / "tests" / "vectors").iterdir())
TESTS = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
NOT_WATCHED = {("source",)}  # where the RFC's vectors are from, for people


def readers(vectors: Path) -> list[Path]:
    return [path for path, text in TESTS.items() if f'"{vectors.name}"' in text]


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values that are no table and no list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in inner:
        if isinstance(each, dict | list):
            yield from leaves(each, (*place, key))
        else:
            yield (*place, key)


def altered(text: str, place: tuple[Any, ...]) -> str:
    """The same JSON with one value another."""
    whole = json.loads(text)
    table = whole
    for key in place[:-1]:
        table = table[key]
    old = table[place[-1]]
    if isinstance(old, str):
        table[place[-1]] = old[:-1] + ("1" if old.endswith("0") else "0")
    else:
        table[place[-1]] = old + 1
    return json.dumps(whole)


@pytest.mark.parametrize("vectors", VECTORS, ids=lambda path: path.name)
def test_each_file_of_frozen_bytes_is_read_by_a_test_and_can_be_altered(vectors):
    assert readers(vectors)
    if vectors.suffix == ".json":
        text = vectors.read_text()
        assert all(
            altered(text, place) != json.dumps(json.loads(text))
            for place in leaves(json.loads(text))
        )


@pytest.mark.campaign
@pytest.mark.parametrize("name", [path.name for path in VECTORS if path.suffix == ".json"])
def test_a_value_that_was_altered_is_noticed(tmp_path, name):
    copy = tmp_path / "midge"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.npz")
    shutil.copytree(ROOT, copy, ignore=ignored)
    vectors = copy / "tests" / "vectors" / name
    text = vectors.read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               *(str(path.relative_to(ROOT)) for path in readers(vectors)),
               "-k", "frozen or version or rfc or signed or measured"]  # fmt: skip

    def passes() -> bool:
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=300)
        return done.returncode == 0

    assert passes()
    places = [place for place in leaves(json.loads(text)) if place not in NOT_WATCHED]
    unnoticed = []
    for place in places[:: max(1, len(places) // 15)]:  # of a long file some
        vectors.write_text(altered(text, place))
        unnoticed += [place] if passes() else []
    assert unnoticed == []
    vectors.unlink()
    assert not passes()
