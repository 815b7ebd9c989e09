"""Whoever follows the tour or the map finds each file where they say it is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("broker_bridge", "device_client", "server")
_NAMED = re.compile(r"`([\w./-]*\w(?:\.py|\.sh|/))`")
_LISTED = re.compile(r"^    ([\w/]+(?:\.py|/))", re.MULTILINE)


def places() -> set[str]:
    """Every file and folder of the project, folders with a slash at the end."""
    found = set()
    for top in (*ROOMS, "tests", "examples", "benchmarks", "docs"):
        for path in (ROOT / top, *(ROOT / top).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            found.add(f"/{name}/" if path.is_dir() else f"/{name}")
    return found


PLACES = places()


def nowhere(names: list[str]) -> list[str]:
    """Which of these end no path of the project."""
    return [name for name in names if not any(place.endswith(f"/{name}") for place in PLACES)]


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "docs/tour.md", "CONTRIBUTING.md"])
def test_each_file_that_a_page_names_exists(page: str) -> None:
    names = _NAMED.findall((ROOT / page).read_text())
    assert names
    assert nowhere(names) == []


def test_each_file_that_a_folder_lists_lies_in_it() -> None:
    lists = 0
    for file in (f for room in ROOMS for f in (ROOT / room).rglob("__init__.py")):
        names = _LISTED.findall(ast.get_docstring(ast.parse(file.read_text()), clean=False) or "")
        lists += bool(names)
        assert [name for name in names if not (file.parent / name).exists()] == [], file
    assert lists > 3


def test_a_name_that_is_nowhere_is_caught() -> None:
    assert nowhere(["participant.py", "duties/round.py", "duties/"]) == []
    assert nowhere(["duties/coordinator.py", "articipant.py"]) == [
        "duties/coordinator.py",
        "articipant.py",
    ]
