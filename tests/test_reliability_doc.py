"""docs/reliability.md promises nothing that no test shows: each test it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "reliability.md"
TEXT = DOC.read_text()
NOT_SHOWN = "not shown yet"

_LINK = re.compile(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)")


def named(text: str) -> set[tuple[str, str]]:
    """Every (test, file) that `text` names."""
    return set(_LINK.findall(text))


def missing(text: str) -> list[str]:
    """What `text` names and the tests do not hold."""
    found = []
    for test, path in sorted(named(text)):
        file = ROOT / path
        tree = ast.parse(file.read_text()) if file.is_file() else ast.Module([], [])
        if test not in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}:
            found.append(f"{path}: {test}")
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of each row of each table, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("fault", "check", "target", "---")]


def without_a_test(text: str) -> list[str]:
    """The faults of the matrix that name no test, and do not say so either."""
    return [
        row[0] for row in rows(text)
        if len(row) == 4 and not named(row[2]) and row[2] != NOT_SHOWN
    ]  # fmt: skip


def test_each_test_that_is_named_exists() -> None:
    assert named(TEXT)
    assert missing(TEXT) == []


def test_no_test_is_named_without_its_file() -> None:
    plain = set(re.findall(r"`(test_\w+)`", TEXT)) - {test for test, _ in named(TEXT)}
    assert plain == set()


def test_each_fault_names_a_test_or_says_that_none_shows_it() -> None:
    assert len(rows(TEXT)) > 30
    assert without_a_test(TEXT) == []


@pytest.mark.parametrize(
    "heading",
    ["The server", "A device", "The broker", "The network", "Load", "Disks and clocks",
     "Fuzzing", "Asking a real installation"],
)  # fmt: skip
def test_each_kind_of_fault_has_its_section(heading: str) -> None:
    assert f"\n## {heading}\n" in TEXT


def test_a_name_that_is_wrong_is_caught() -> None:
    here = "tests/test_reliability_doc.py"
    good = f"[`test_a_name_that_is_wrong_is_caught`](../{here})"
    assert missing(good) == []
    assert missing(good.replace("wrong", "right")) == [
        f"{here}: test_a_name_that_is_right_is_caught"
    ]
    assert missing(good.replace("doc.py", "no.py"))


def test_a_row_without_a_test_is_caught() -> None:
    assert without_a_test("| flood | dry feet | by faith | — |") == ["flood"]
    assert without_a_test(f"| flood | dry feet | {NOT_SHOWN} | — |") == []
