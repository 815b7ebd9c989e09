import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import LocalError
from server.fleet.sealed_file import Cost, Reader, Writer

WORDS = "four words nobody guesses"
CHEAP = Cost(passes=1, memory_kib=8)
HEADER_BYTES = 15 + 8 + 16
FROZEN = Path(__file__).parents[2] / "vectors" / "backup-v1.bin"


def sealed(data: bytes, *pieces: int, words: str = WORDS) -> bytes:
    out = io.BytesIO()
    writer = Writer(out, words, cost=CHEAP)
    at = 0
    for length in pieces:
        assert writer.write(data[at : at + length]) == len(data[at : at + length])
        at += length
    writer.write(data[at:])
    writer.finish()
    return out.getvalue()


def opened(file: bytes, words: str = WORDS) -> bytes:
    reader = Reader(io.BytesIO(file), words, name="a file")
    found = b""
    while part := reader.read(10_240):
        found += part
    reader.finish()
    return found


@settings(max_examples=30)
@given(
    st.sampled_from([0, 1, 65_535, 65_536, 65_537, 131_072, 200_000]),
    st.lists(st.integers(0, 70_000), max_size=4),
)
def test_what_was_written_is_read_however_it_was_cut_up(length, pieces):
    data = bytes(range(256)) * (length // 256 + 1)
    assert opened(sealed(data[:length], *pieces)) == data[:length]


def test_a_file_cut_short_anywhere_is_refused():
    file = sealed(b"x" * 65_536 + b"end")
    places = [*range(80), 65_536, HEADER_BYTES + 65_536 + 16, *range(len(file) - 20, len(file))]
    for place in places:
        with pytest.raises(LocalError, match=r"cut short|not a backup"):
            opened(file[:place])


@settings(max_examples=300)
@given(st.data())
def test_a_file_with_any_bit_flipped_is_refused(data):
    file = bytearray(sealed(b"x" * 65_536 + b"end"))
    bit = data.draw(st.integers(HEADER_BYTES * 8, len(file) * 8 - 1))
    file[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LocalError, match="altered"):
        opened(bytes(file))


def test_a_header_with_any_bit_flipped_is_refused():
    file = sealed(b"the end")
    for bit in range(HEADER_BYTES * 8):
        bad = bytearray(file)
        bad[bit // 8] ^= 1 << bit % 8
        if 1 << 15 <= int.from_bytes(bad[19:23], "big") <= 1 << 20:
            continue  # as good as the others, at the price of up to a gigabyte
        with pytest.raises(LocalError, match=r"altered|not a backup"):
            opened(bytes(bad))


@pytest.mark.parametrize(("passes", "memory_kib"), [(0, 8), (17, 8), (1, 7), (1, 2**20 + 1)])
def test_costs_that_no_backup_has_are_refused_before_they_are_paid(passes, memory_kib):
    file = bytearray(sealed(b"the end"))
    file[15:23] = passes.to_bytes(4, "big") + memory_kib.to_bytes(4, "big")
    with pytest.raises(LocalError, match="altered"):
        Reader(io.BytesIO(bytes(file)), WORDS, name="a file")


def test_pieces_moved_left_out_repeated_or_of_another_file_are_refused():
    file, other = sealed(b"a" * 140_000), sealed(b"a" * 140_000)
    size = 65_536 + 16
    head, first, second, last = (
        file[:HEADER_BYTES],
        file[HEADER_BYTES : HEADER_BYTES + size],
        file[HEADER_BYTES + size : HEADER_BYTES + 2 * size],
        file[HEADER_BYTES + 2 * size :],
    )
    foreign = other[HEADER_BYTES : HEADER_BYTES + size]
    assert opened(head + first + second + last) == b"a" * 140_000
    for pieces in (
        [second, first, last], [first, last], [first, first, second, last], [first, second],
        [foreign, second, last], [first, second, last, last], [first, second, last + b"\0"],
    ):  # fmt: skip
        with pytest.raises(LocalError, match="altered or cut short"):
            opened(head + b"".join(pieces))


def test_other_words_do_not_open_it_and_the_sentence_says_so():
    with pytest.raises(LocalError, match="a file: the passphrase is wrong, or the file was"):
        opened(sealed(b"secret"), "four words anybody guesses")


def test_the_same_words_from_another_keyboard_open_it():
    assert opened(sealed(b"x", words="Zürich im Winter"), "Zu\u0308rich im Winter") == b"x"


def test_a_short_passphrase_is_refused():
    with pytest.raises(LocalError, match="at least 12 characters"):
        Writer(io.BytesIO(), "hunter2")


def test_the_file_shows_nothing_of_what_is_in_it():
    file = sealed(b"secret" * 1000)
    assert b"secret" not in file
    assert len({sealed(b"secret")[HEADER_BYTES:] for _ in range(3)}) == 3


def test_the_frozen_file_is_still_opened():
    assert opened(FROZEN.read_bytes()) == b"what a backup of version 1 held\n"
