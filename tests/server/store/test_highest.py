"""The file of the highest round: what it claims, and what it does not."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.disk import RealDisk
from server.store.highest import HighestRound, from_line, to_line

FROZEN = b"1790000000001 93969854cd3bc64c\n"


@given(st.integers(0, 2**53))
def test_a_number_comes_back_from_its_line(number: int) -> None:
    assert from_line(to_line(number)) == number


def test_a_line_is_what_it_was() -> None:
    assert to_line(1_790_000_000_001) == FROZEN


def test_a_line_that_is_cut_short_claims_nothing() -> None:
    assert [n for n in range(len(FROZEN)) if from_line(FROZEN[:n]) is not None] == []


def test_a_line_with_any_bit_flipped_claims_nothing() -> None:
    for place in range(len(FROZEN) * 8):
        line = bytearray(FROZEN)
        line[place // 8] ^= 1 << place % 8
        assert from_line(bytes(line)) is None, line


def test_a_number_of_another_line_claims_nothing() -> None:
    assert from_line(b"42" + to_line(41)[2:]) is None


# ── The file ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "highest-round"


def test_a_file_that_is_not_there_claims_nothing_and_says_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert HighestRound(path).known == 0
    assert caplog.records == []


def test_what_was_noted_is_known_to_the_next_process(path: Path) -> None:
    HighestRound(path).note(41)
    assert HighestRound(path).known == 41
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_is_never_put_back_also_by_a_process_that_did_not_look(path: Path) -> None:
    HighestRound(path).note(41)
    HighestRound(path).note(40)
    assert HighestRound(path).known == 41


def test_what_it_knows_is_not_written_again(path: Path) -> None:
    written = []

    class Counting(RealDisk):
        def unlink(self, path: Path) -> None:
            written.append(path.name)
            super().unlink(path)

    file = HighestRound(path, disk=Counting())
    for number in (0, 1, 1, 2, 1):
        file.note(number)
    assert written == ["highest-round.new"] * 2


@pytest.mark.parametrize("content", [b"", b"\0" * 31, b"41", to_line(41) * 2, b"\xff" * 4096])
def test_a_damaged_file_is_one_sentence_claims_nothing_and_is_written_anew(
    path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path.write_bytes(content)
    file = HighestRound(path)
    with caplog.at_level(logging.WARNING):
        assert (file.known, file.known) == (0, 0)
    (said,) = caplog.messages
    assert "highest-round cannot be read" in said
    file.note(7)
    assert HighestRound(path).known == 7


def test_a_file_that_the_disk_cannot_read_is_written_anew(path: Path) -> None:
    class Failing(RealDisk):
        def read(self, path: Path) -> bytes:
            raise OSError(5, "Input/output error")

    HighestRound(path).note(41)
    file = HighestRound(path, disk=Failing())
    assert file.known == 0
    file.note(42)
    assert HighestRound(path).known == 42
