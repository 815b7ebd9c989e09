"""docs/threats.md names no attack without a test, and no test that is not there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "threats.md").read_text()
ATTACKS = "## Attacks, and the tests that try them"


def every_test() -> set[str]:
    """The name of every test function."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    return {name for name in found if name.startswith("test_")}


def named(text: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", text))


def rows(text: str) -> list[str]:
    """The rows of the table of attacks, without its heading."""
    table = text.split(ATTACKS)[1]
    return [line for line in table.splitlines() if line.startswith("| ")][1:]


def test_each_test_that_is_named_exists() -> None:
    assert len(named(TEXT)) > 40
    assert named(TEXT) - every_test() == set()


def test_each_attack_names_a_test() -> None:
    assert len(rows(TEXT)) > 20
    assert [row for row in rows(TEXT) if not named(row)] == []


def test_what_is_not_protected_is_said() -> None:
    """Metadata, a malicious server in plain mode, a rooted device."""
    for words in ("who takes part", "each device's update in the clear", "has the rights of root"):
        assert words in TEXT, words


def test_a_name_that_is_wrong_and_a_row_without_one_are_caught() -> None:
    assert named("tried by `test_that_is_nowhere`") - every_test()
    made = f"{ATTACKS}\n| attack | by | tried |\n|---|---|---|\n| theft | thief | faith |\n"
    assert [row for row in rows(made) if not named(row)] == ["| theft | thief | faith |"]
