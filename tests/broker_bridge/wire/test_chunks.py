"""Chunks: late, twice, out of order, cut or forged, the message that comes out is the one sent."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.chunks import (
    CHUNK_OVERHEAD_BYTES,
    ChunkHeader,
    Layout,
    Reassembler,
    bitmap_of,
    chunk_header,
    missing_in,
    open_chunk,
    seal_chunks,
    tags_digest,
)
from broker_bridge.wire.envelope import ChunkKey

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "chunks-v1.json").read_text())

KEY, OTHER_KEY = ChunkKey(bytes([1] * 32)), ChunkKey(bytes([2] * 32))
TRANSFER, OTHER_TRANSFER = b"transfer", b"another!"
MESSAGE = bytes(range(100))
LAYOUT = Layout(len(MESSAGE), 40)
CHUNKS = tuple(seal_chunks(MESSAGE, LAYOUT, transfer=TRANSFER, key=KEY))

MESSAGES = st.binary(min_size=1, max_size=400)


def flipped(data: bytes, bit: int) -> bytes:
    altered = bytearray(data)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


def collecting(layout: Layout = LAYOUT) -> Reassembler:
    return Reassembler(layout, transfer=TRANSFER, key=KEY)


def reason(reassembler: Reassembler, chunk: bytes) -> str:
    before = reassembler.missing()
    with pytest.raises(PeerError) as caught:
        reassembler.add(chunk)
    assert reassembler.missing() == before
    return caught.value.reason


# ── What is sent arrives ────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(MESSAGES, st.integers(1, 120), st.data())
def test_a_message_comes_back_whole_in_any_order_and_however_often(
    message: bytes, body_bytes: int, data: st.DataObject
) -> None:
    layout = Layout(len(message), body_bytes)
    chunks = list(seal_chunks(message, layout, transfer=TRANSFER, key=KEY))
    repeats = data.draw(st.lists(st.sampled_from(chunks), max_size=5))
    reassembler = collecting(layout)
    for chunk in data.draw(st.permutations(chunks + repeats)):
        reassembler.add(chunk)
    assert reassembler.complete
    assert reassembler.held == layout.count == len(chunks)
    assert reassembler.message() == message


@settings(deadline=None)
@given(MESSAGES, st.integers(1, 120))
def test_the_sizes_of_a_layout_add_up(message: bytes, body_bytes: int) -> None:
    layout = Layout(len(message), body_bytes)
    assert sum(layout.size(i) for i in range(layout.count)) == len(message)
    assert all(layout.size(i) == body_bytes for i in range(layout.count - 1))
    assert layout.start(layout.count - 1) + layout.size(layout.count - 1) == len(message)
    assert layout.size(layout.count - 1) > 0


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(LIMITS.packet_bytes_min, LIMITS.packet_bytes_max))
def test_a_chunk_its_topic_and_headers_fit_the_packet(total_bytes: int, packet_bytes: int) -> None:
    layout = Layout.for_packets(total_bytes, packet_bytes)
    largest = layout.size(0) + CHUNK_OVERHEAD_BYTES + LIMITS.packet_overhead_bytes
    assert largest <= packet_bytes


def test_what_is_missing_is_told_until_nothing_is() -> None:
    reassembler = collecting()
    assert reassembler.missing() == [0, 1, 2]
    assert not reassembler.add(CHUNKS[1])
    assert reassembler.missing() == [0, 2]
    assert not reassembler.add(CHUNKS[1])
    assert reassembler.held == 1
    assert not reassembler.add(CHUNKS[2])
    assert reassembler.add(CHUNKS[0])
    assert reassembler.missing() == []
    assert reassembler.message() == MESSAGE


def test_a_chunk_shows_its_place_and_nothing_of_its_body() -> None:
    assert [chunk_header(c) for c in CHUNKS] == [ChunkHeader(TRANSFER, i, 3) for i in range(3)]
    assert open_chunk(CHUNKS[2], KEY) == MESSAGE[80:]
    assert all(MESSAGE[i : i + 8] not in b"".join(CHUNKS) for i in range(len(MESSAGE) - 8))


def test_the_frozen_chunks_of_version_1_still_open_and_are_still_made() -> None:
    frozen = tuple(map(bytes.fromhex, VECTORS["chunks"]))
    reassembler = collecting()
    assert [reassembler.add(chunk) for chunk in frozen] == [False, False, True]
    assert reassembler.message() == MESSAGE
    assert frozen == CHUNKS
    assert tags_digest(frozen).hex() == VECTORS["tags digest"]


# ── What was not sent does not ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("index", range(3))
def test_a_chunk_cut_short_at_any_length_is_refused(index: int) -> None:
    chunk = CHUNKS[index]
    assert {reason(collecting(), chunk[:n]) for n in range(len(chunk))} == {"bad_chunk"}


@pytest.mark.parametrize("index", range(3))
def test_any_bit_flipped_in_a_chunk_is_refused(index: int) -> None:
    chunk = CHUNKS[index]
    reasons = {reason(collecting(), flipped(chunk, bit)) for bit in range(8 * len(chunk))}
    assert reasons == {"bad_chunk", "bad_version", "other_transfer", "bad_seal"}


def test_a_chunk_one_byte_too_long_is_refused() -> None:
    assert reason(collecting(), CHUNKS[0] + b"\0") == "bad_chunk"


def test_a_forged_chunk_does_not_take_the_place_of_a_true_one() -> None:
    reassembler = collecting()
    forged = tuple(seal_chunks(bytes(100), LAYOUT, transfer=TRANSFER, key=OTHER_KEY))
    for fake, true in zip(forged, CHUNKS, strict=True):
        assert reason(reassembler, fake) == "bad_seal"
        reassembler.add(true)
    assert reassembler.message() == MESSAGE


def test_a_true_chunk_in_anothers_place_is_refused() -> None:
    moved = ChunkHeader(TRANSFER, 1, 3).encode() + CHUNKS[0][24:]
    assert reason(collecting(), moved) == "bad_seal"


def test_a_chunk_of_another_transfer_is_refused() -> None:
    (other, *_) = seal_chunks(MESSAGE, LAYOUT, transfer=OTHER_TRANSFER, key=KEY)
    assert reason(collecting(), other) == "other_transfer"
    relabelled = ChunkHeader(TRANSFER, 0, 3).encode() + other[24:]
    assert reason(collecting(), relabelled) == "bad_seal"


@pytest.mark.parametrize("body_bytes", [39, 41, 50, 20, 100])
def test_a_chunk_of_another_layout_is_refused(body_bytes: int) -> None:
    layout = Layout(len(MESSAGE), body_bytes)
    (other, *_) = seal_chunks(MESSAGE, layout, transfer=TRANSFER, key=KEY)
    assert reason(collecting(), other) == "bad_chunk"


def header(
    magic: bytes = b"mg",
    version: int = 1,
    gap: int = 0,
    index: int = 0,
    count: int = 3,
    end: int = 0,
) -> bytes:
    """The first chunk under another header."""
    return (
        struct.pack("<2sBB8sIII", magic, version, gap, TRANSFER, index, count, end) + CHUNKS[0][24:]
    )


FORGERIES = {
    "another magic": ({"magic": b"MG"}, "bad_chunk"),
    "version 0": ({"version": 0}, "bad_version"),
    "version 2": ({"version": 2}, "bad_version"),
    "an index past the end": ({"index": 3}, "bad_chunk"),
    "no chunks at all": ({"count": 0}, "bad_chunk"),
    "more chunks than we hold": ({"count": LIMITS.chunks_max + 1}, "bad_chunk"),
    "a byte in the first gap": ({"gap": 1}, "bad_chunk"),
    "a byte in the last gap": ({"end": 1}, "bad_chunk"),
}


@pytest.mark.parametrize(("changes", "expected"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_header_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert header() == CHUNKS[0]
    with pytest.raises(PeerError) as caught:
        chunk_header(header(**changes))
    assert caught.value.reason == expected


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    assert reason(collecting(), data) in {"bad_chunk", "bad_version"}


@pytest.mark.parametrize(
    ("total_bytes", "body_bytes"), [(0, 1), (-1, 1), (1, 0), (1, -1), (LIMITS.chunks_max + 1, 1)]
)
def test_a_transfer_of_impossible_size_is_refused(total_bytes: int, body_bytes: int) -> None:
    with pytest.raises(PeerError) as caught:
        Layout(total_bytes, body_bytes)
    assert caught.value.reason == "bad_size"


def test_a_packet_too_small_for_a_body_is_refused() -> None:
    with pytest.raises(PeerError, match="impossible"):
        Layout.for_packets(1_000, LIMITS.packet_overhead_bytes + CHUNK_OVERHEAD_BYTES)


def test_the_digest_of_tags_sees_every_chunk_and_its_place() -> None:
    whole = tags_digest(CHUNKS)
    assert whole != tags_digest(CHUNKS[::-1])
    assert whole != tags_digest(CHUNKS[:-1])
    assert whole != tags_digest((*CHUNKS[:-1], flipped(CHUNKS[-1], 8 * len(CHUNKS[-1]) - 1)))


# ── Bitmaps ─────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_a_bitmap_comes_back_as_the_indices_it_was_made_of(count: int, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, count - 1)))
    assert missing_in(bitmap_of(indices, count), count) == sorted(indices)


def test_the_frozen_bitmap_of_version_1_still_reads() -> None:
    assert bitmap_of([0, 9], 10).hex() == VECTORS["bitmap of 0 and 9 of 10"]
    assert missing_in(bytes.fromhex(VECTORS["bitmap of 0 and 9 of 10"]), 10) == [0, 9]


@settings(deadline=None)
@given(st.integers(1, 300), st.binary(max_size=50))
def test_a_bitmap_of_another_length_is_refused(count: int, bitmap: bytes) -> None:
    if len(bitmap) == -(-count // 8):
        bitmap += b"\xff"
    with pytest.raises(PeerError) as caught:
        missing_in(bitmap, count)
    assert caught.value.reason == "bad_bitmap"
