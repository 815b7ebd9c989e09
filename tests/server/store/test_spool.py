"""The spool, with real files: chunks in any order, restarts, torn and forged chunks."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.chunks import (
    CHUNK_OVERHEAD_BYTES,
    ChunkHeader,
    Layout,
    chunk_header,
    open_chunk,
    seal_chunks,
)
from broker_bridge.wire.envelope import ChunkKey
from server.store.spool import Spool

KEY = ChunkKey(b"k" * 32)
UPLOAD = b"upload-1"
LAYOUT = Layout(total_bytes=950, body_bytes=100)
MESSAGE = bytes(range(256)) * 3 + bytes(182)


def sealed(upload: bytes = UPLOAD, layout: Layout = LAYOUT) -> list[bytes]:
    message = (MESSAGE * (layout.total_bytes // len(MESSAGE) + 1))[: layout.total_bytes]
    return list(seal_chunks(message, layout, transfer=upload, key=KEY))


CHUNKS = sealed()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(folder: Path) -> Spool:
    spool = Spool(folder)
    spool.begin(UPLOAD, LAYOUT)
    return spool


def reopened(spool: Spool) -> Spool:
    """What a new process finds, after the old one ended without a word."""
    again = Spool(spool.folder)
    for upload in again.uploads():
        again.begin(upload, LAYOUT)
    return again


def put(spool: Spool, chunk: bytes) -> bool:
    return spool.put(chunk_header(chunk), chunk)


# ── One upload ──────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, LAYOUT.count - 1), max_size=30), st.sets(st.integers(0, 29)))
def test_chunks_in_any_order_with_restarts_anywhere(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], restarts: set[int]
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    spool.begin(UPLOAD, LAYOUT)
    there: set[int] = set()
    for number, index in enumerate(order):
        assert put(spool, CHUNKS[index]) == (index not in there)
        there.add(index)
        if number in restarts:
            spool.close()
            spool = reopened(spool)
        assert spool.missing(UPLOAD) == sorted(set(range(LAYOUT.count)) - there)
        assert spool.lacks(UPLOAD) == LAYOUT.count - len(there)
        assert spool.complete(UPLOAD) == (len(there) == LAYOUT.count)
        assert spool.present(UPLOAD, LAYOUT) == there
    for index in spool.missing(UPLOAD):
        put(spool, CHUNKS[index])
    assert list(spool.chunks(UPLOAD, LAYOUT)) == CHUNKS
    spool.close()


@given(st.integers(1, 2000), st.integers(1, 700))
def test_every_layout_is_kept_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, total: int, body: int
) -> None:
    layout = Layout(total, body)
    chunks = sealed(layout=layout)
    spool = Spool(tmp_path_factory.mktemp("spool"))
    spool.begin(UPLOAD, layout)
    for index in reversed(range(layout.count)):
        put(spool, chunks[index])
    assert list(spool.chunks(UPLOAD, layout)) == chunks
    assert spool.bytes_held == sum(map(len, chunks)) == spool._path(UPLOAD).stat().st_size
    spool.close()


def test_a_chunk_that_is_there_is_never_overwritten(spool: Spool) -> None:
    forged = CHUNKS[3][:-1] + b"!"
    assert put(spool, CHUNKS[3])
    assert not put(spool, forged)
    again = reopened(spool)
    assert not put(again, forged)
    assert list(again.chunks(UPLOAD, LAYOUT))[3] == CHUNKS[3]


def test_to_begin_again_changes_nothing(spool: Spool) -> None:
    put(spool, CHUNKS[0])
    before = spool.bytes_held
    spool.begin(UPLOAD, LAYOUT)
    assert spool.missing(UPLOAD) == list(range(1, LAYOUT.count))
    assert spool.bytes_held == before
    with pytest.raises(PeerError) as caught:
        spool.begin(UPLOAD, Layout(950, 99))
    assert caught.value.reason == "other_layout"


FORGED = {
    "of another count": sealed(layout=Layout(1050, 100))[0],
    "too long": CHUNKS[0] + b"x",
    "too short": CHUNKS[0][:-1],
    "cut to its header": CHUNKS[0][:24],
    "empty": b"",
    "the last one, as long as the others": ChunkHeader(UPLOAD, 9, 10).encode() + bytes(116),
    "no chunk": b"\x00" * len(CHUNKS[0]),
    "beyond the end": ChunkHeader(UPLOAD, 10, 11).encode() + bytes(116),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_chunk_that_does_not_belong_there_is_not_written(spool: Spool, name: str) -> None:
    chunk = FORGED[name]
    with pytest.raises(PeerError):
        put(spool, chunk)
    assert spool._path(UPLOAD).stat().st_size == 0
    assert spool.missing(UPLOAD) == list(range(LAYOUT.count))


# ── Torn and forged chunks ──────────────────────────────────────────────────────────────


def filled(spool: Spool) -> Spool:
    for chunk in CHUNKS:
        put(spool, chunk)
    return spool


def bad_ones(spool: Spool) -> list[int]:
    """What whoever opens an update finds: the chunks whose tag is wrong."""
    bad = []
    for index, chunk in enumerate(spool.chunks(UPLOAD, LAYOUT)):
        try:
            open_chunk(chunk, KEY)
        except PeerError:
            bad.append(index)
    return bad


@pytest.mark.parametrize("keeps_bytes", [0, 1, 23, 24, 60, 139])
@pytest.mark.parametrize("torn", [0, 4, 9])
def test_a_torn_chunk_is_missing_or_found_out_and_then_asked_for(
    spool: Spool, torn: int, keeps_bytes: int
) -> None:
    """A power cut keeps the first bytes of a chunk and leaves zeros for the rest."""
    filled(spool).close()
    start, length = torn * (100 + CHUNK_OVERHEAD_BYTES), len(CHUNKS[torn])
    data = bytearray(spool._path(UPLOAD).read_bytes())
    keeps = min(keeps_bytes, length - 1)
    data[start + keeps : start + length] = bytes(length - keeps)
    spool._path(UPLOAD).write_bytes(data)

    again = reopened(spool)
    if again.complete(UPLOAD):
        assert bad_ones(again) == [torn]
        again.forget(UPLOAD, torn)
    assert again.missing(UPLOAD) == [torn]
    assert put(again, CHUNKS[torn])
    assert bad_ones(again) == []
    assert list(again.chunks(UPLOAD, LAYOUT)) == CHUNKS


@pytest.mark.parametrize("size", [0, 1, 24, 139, 140, 141, 700, 1349])
def test_a_file_cut_short_has_only_its_whole_chunks(spool: Spool, size: int) -> None:
    filled(spool).close()
    data = spool._path(UPLOAD).read_bytes()
    assert len(data) == 1350
    spool._path(UPLOAD).write_bytes(data[:size])
    assert reopened(spool).missing(UPLOAD) == list(range(size // 140, LAYOUT.count))


def test_a_forgotten_chunk_is_missing_after_a_restart_too(spool: Spool) -> None:
    filled(spool).forget(UPLOAD, 5)
    spool.forget(UPLOAD, 5)
    assert spool.missing(UPLOAD) == [5]
    again = reopened(spool)
    assert again.missing(UPLOAD) == [5]
    put(again, CHUNKS[5])
    assert list(again.chunks(UPLOAD, LAYOUT)) == CHUNKS


def test_chunks_of_another_layout_are_not_taken_for_this_one(spool: Spool) -> None:
    filled(spool).close()
    other = Layout(950, 90)
    again = Spool(spool.folder)
    again.begin(UPLOAD, other)
    assert again.missing(UPLOAD) == list(range(other.count))
    chunks = sealed(layout=other)
    for chunk in chunks:
        put(again, chunk)
    assert list(again.chunks(UPLOAD, other)) == chunks


# ── Many uploads ────────────────────────────────────────────────────────────────────────


def names(count: int) -> list[bytes]:
    return [hashlib.sha256(bytes([n % 256, n // 256])).digest()[:8] for n in range(count)]


def test_more_uploads_than_open_files_are_kept_apart(folder: Path) -> None:
    spool = Spool(folder)
    uploads = names(200)
    for upload in uploads:
        spool.begin(upload, LAYOUT)
    for index in range(LAYOUT.count):
        for upload in uploads:
            put(spool, sealed(upload)[index])
    assert len(spool._handles) <= 64
    spool.sync(uploads)
    for upload in uploads:
        assert list(spool.chunks(upload, LAYOUT)) == sealed(upload)
    spool.close()


def test_a_dropped_upload_is_gone_and_can_begin_anew(spool: Spool) -> None:
    filled(spool).drop(UPLOAD)
    assert spool.bytes_held == 0
    assert list(spool.folder.iterdir()) == []
    spool.drop(UPLOAD)
    spool.begin(UPLOAD, LAYOUT)
    assert spool.missing(UPLOAD) == list(range(LAYOUT.count))


def test_clear_keeps_what_it_is_told_to_of_both_processes(spool: Spool) -> None:
    one, two, three = names(3)
    for upload in (one, two):
        spool.begin(upload, LAYOUT)
        put(spool, sealed(upload)[0])
    spool.close()
    again = Spool(spool.folder)
    again.begin(one, LAYOUT)
    again.begin(three, LAYOUT)
    assert again.uploads() == {UPLOAD, one, two, three}
    again.clear(keep=[two, three])
    assert again.uploads() == {two, three}
    assert {p.stem for p in again.folder.iterdir()} == {two.hex(), three.hex()}
    again.clear()
    assert (again.uploads(), again.bytes_held) == (set(), 0)


def test_what_is_held_is_counted_over_restarts(spool: Spool) -> None:
    whole = LAYOUT.total_bytes + LAYOUT.count * CHUNK_OVERHEAD_BYTES
    assert spool.bytes_held == whole
    put(spool, CHUNKS[0])
    spool.close()
    again = Spool(spool.folder)
    assert again.bytes_held == len(CHUNKS[0])
    again.begin(UPLOAD, LAYOUT)
    assert again.bytes_held == whole
    again.drop(UPLOAD)
    assert again.bytes_held == 0


def test_sync_of_nothing_and_of_what_was_synced_is_harmless(spool: Spool) -> None:
    spool.sync([])
    filled(spool).sync([UPLOAD])
    spool.sync([UPLOAD])
    assert spool.complete(UPLOAD)


def test_files_of_others_are_let_be(folder: Path) -> None:
    folder.mkdir()
    for name in ("notes.txt", "00.update", "zz" * 8 + ".update"):
        (folder / name).write_bytes(b"mine")
    spool = Spool(folder)
    spool.clear()
    assert len(list(folder.iterdir())) == 3


def test_only_its_owner_can_read_an_update(spool: Spool) -> None:
    assert spool._path(UPLOAD).stat().st_mode & 0o777 == 0o600
    assert spool.folder.stat().st_mode & 0o777 == 0o700


# ── When the disk refuses ───────────────────────────────────────────────────────────────


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"")
    with pytest.raises(LocalError, match="spool: "):
        Spool(tmp_path / "spool")


def test_a_link_in_the_place_of_an_update_is_not_followed(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    folder.mkdir()
    (folder / f"{UPLOAD.hex()}.update").symlink_to(victim)
    with pytest.raises(LocalError, match=rf"{UPLOAD.hex()}\.update: "):
        Spool(folder).begin(UPLOAD, LAYOUT)
    assert victim.read_bytes() == b"mine"


def test_a_sync_that_fails_promises_nothing_and_the_chunks_are_asked_for_again(
    spool: Spool,
) -> None:
    kept = names(1)[0]
    spool.begin(kept, LAYOUT)
    put(spool, sealed(kept)[0])
    filled(spool)
    # /dev/null takes every write, keeps nothing, and refuses to sync: a disk that lies.
    os.dup2(os.open("/dev/null", os.O_RDWR), spool._open(UPLOAD))
    with pytest.raises(LocalError, match=rf"{UPLOAD.hex()}\.update: "):
        spool.sync([kept, UPLOAD])
    assert spool.missing(UPLOAD) == list(range(LAYOUT.count))
    assert spool.missing(kept) == list(range(1, LAYOUT.count))

    spool.close()  # the disk is well again
    filled(spool).sync([UPLOAD])
    assert list(reopened(spool).chunks(UPLOAD, LAYOUT)) == CHUNKS
