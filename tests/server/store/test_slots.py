"""Small updates in one file: whatever is true of a file of one's own is true of a slot."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker_bridge.disk import DiskFullError, RealDisk
from broker_bridge.errors import LocalError
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, Layout, chunk_header, seal_chunks
from broker_bridge.wire.envelope import ChunkKey
from server.store import slots
from server.store.spool import Spool
from tests.server.store.spool_model import LAYOUTS, ModelledSpool

KEY = ChunkKey(b"k" * 32)
LAYOUT = Layout(total_bytes=9_500, body_bytes=1_000)
SHARED = 64 * 1024


def name(number: int) -> bytes:
    return number.to_bytes(8, "big")


def sealed(upload: bytes, layout: Layout = LAYOUT) -> list[bytes]:
    message = (upload * (layout.total_bytes // 8 + 1))[: layout.total_bytes]
    return list(seal_chunks(message, layout, transfer=upload, key=KEY))


def opened(folder: Path, disk: RealDisk | None = None) -> Spool:
    return Spool(folder, shared_bytes_max=SHARED, disk=disk or RealDisk())


def filled(folder: Path, count: int = 3) -> Spool:
    spool = opened(folder)
    for number in range(count):
        put(spool, name(number))
    return spool


def put(spool: Spool, upload: bytes, layout: Layout = LAYOUT) -> None:
    spool.begin(upload, layout)
    for chunk in sealed(upload, layout):
        spool.put(chunk_header(chunk), chunk)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, LAYOUT.count - 1)), max_size=40),
    st.sets(st.integers(0, 39)),
    st.sets(st.integers(0, 39)),
)
def test_chunks_of_many_in_any_order_with_drops_and_restarts_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    order: list[tuple[int, int]],
    restarts: set[int],
    drops: set[int],
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = opened(folder)
    there: dict[bytes, set[int]] = {}
    for step, (number, index) in enumerate(order):
        upload = name(number)
        if step in restarts:
            spool.close()
            spool = opened(folder)
            for each in there:
                spool.begin(each, LAYOUT)
        if step in drops:
            spool.drop(upload)
            there.pop(upload, None)
            continue
        spool.begin(upload, LAYOUT)
        spool.put(chunk_header(sealed(upload)[index]), sealed(upload)[index])
        there.setdefault(upload, set()).add(index)
        assert spool.uploads() == set(there)
        assert [each in spool for each in map(name, range(4))] == [
            each in there for each in map(name, range(4))
        ]
        for each, indices in there.items():
            assert spool.present(each, LAYOUT) == indices
    assert spool.bytes_held == len(there) * (9_500 + LAYOUT.count * CHUNK_OVERHEAD_BYTES)
    for upload in there:
        for index in spool.missing(upload):
            spool.put(chunk_header(sealed(upload)[index]), sealed(upload)[index])
        assert list(spool.chunks(upload, LAYOUT)) == sealed(upload)
    spool.close()


def test_small_updates_share_a_file_and_a_large_one_has_its_own(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    assert names(tmp_path) == ["shared.updates"]
    put(spool, name(9), Layout(SHARED, 1_000))
    assert names(tmp_path) == [f"{name(9).hex()}.update", "shared.updates"]
    spool.sync([name(0), name(9)])
    spool.clear()
    assert names(tmp_path) == []


def test_a_group_costs_one_sync(tmp_path: Path) -> None:
    class Counting(RealDisk):
        files = 0

        def fdatasync(self, fds):
            self.files += len(fds)
            return super().fdatasync(fds)

    disk = Counting()
    spool = opened(tmp_path, disk)
    for number in range(40):
        put(spool, name(number))
    spool.sync([name(number) for number in range(40)])
    assert disk.files == 1


def test_at_the_end_of_a_round_the_file_goes_and_no_slot_is_written_to(tmp_path: Path) -> None:
    class Counting(RealDisk):
        writes = 0

        def pwrite(self, fd, data, offset):
            self.writes += 1
            return os.pwrite(fd, data, offset)

    disk = Counting()
    spool = opened(tmp_path, disk)
    for number in range(40):
        put(spool, name(number))
    put(spool, name(99), Layout(SHARED, 1_000))
    before = disk.writes
    spool.clear(keep=[name(99)])
    assert disk.writes == before
    assert names(tmp_path) == [f"{name(99).hex()}.update"]
    assert spool.uploads() == {name(99)}
    put(spool, name(1))
    spool.sync([name(1), name(99)])
    assert opened(tmp_path).uploads() == {name(1), name(99)}


def test_an_upload_without_a_chunk_costs_the_disk_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.begin(name(0), LAYOUT)
    before = (tmp_path / "shared.updates").stat().st_size
    for number in range(1, 5):
        spool.begin(name(number), LAYOUT)
    assert (tmp_path / "shared.updates").stat().st_size == before
    assert spool.uploads() == {name(number) for number in range(5)}
    put(spool, name(3))
    spool.sync([name(3)])
    again = opened(tmp_path)
    assert again.uploads() == {name(3)}
    again.begin(name(3), LAYOUT)
    assert list(again.chunks(name(3), LAYOUT)) == sealed(name(3))


@given(st.permutations(range(LAYOUT.count)), st.integers(1, LAYOUT.count))
def test_whichever_chunk_is_first_the_slot_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], count: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = opened(folder)
    spool.begin(name(0), LAYOUT)
    spool.begin(name(1), LAYOUT)
    for index in order[:count]:
        chunk = sealed(name(1))[index]
        spool.put(chunk_header(chunk), chunk)
    again = opened(folder)
    assert again.uploads() == {name(1)}
    again.begin(name(1), LAYOUT)
    assert again.present(name(1), LAYOUT) == set(order[:count])


def test_an_upload_without_a_chunk_gives_its_slot_back_as_it_was(tmp_path: Path) -> None:
    spool = filled(tmp_path, 2)
    spool.begin(name(5), LAYOUT)
    spool.drop(name(5))
    spool.drop(name(1))
    put(spool, name(6))
    put(spool, name(7))
    size = (tmp_path / "shared.updates").stat().st_size
    spool.sync([name(0), name(6), name(7)])
    assert opened(tmp_path).uploads() == {name(0), name(6), name(7)}
    assert size == (tmp_path / "shared.updates").stat().st_size


def test_a_slot_that_is_kept_keeps_the_file_when_the_others_are_cleared(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    spool.clear(keep=[name(1)])
    assert list(spool.chunks(name(1), LAYOUT)) == sealed(name(1))
    assert opened(tmp_path).uploads() == {name(1)}


def test_the_place_of_a_dropped_update_is_used_again(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    blocks = -(-(tmp_path / "shared.updates").stat().st_size // 4096)
    for number in range(1, 100):
        spool.drop(name(number))
        put(spool, name(number + 2))
    assert (tmp_path / "shared.updates").stat().st_size <= blocks * 4096
    assert list(spool.chunks(name(0), LAYOUT)) == sealed(name(0))
    again = opened(tmp_path)
    assert again.uploads() == {name(0), name(100), name(101)}


def test_an_update_that_comes_back_cut_otherwise_starts_anew(tmp_path: Path) -> None:
    filled(tmp_path).close()
    spool = opened(tmp_path)
    spool.begin(name(1), Layout(9_500, 900))
    assert spool.lacks(name(1)) == 11
    assert spool.uploads() == {name(0), name(1), name(2)}


def test_a_header_that_the_disk_lost_hides_no_other_update(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    fd, start = spool._slots.place(name(1))
    os.pwrite(fd, bytes(64), start - 64)
    spool.close()
    again = opened(tmp_path)
    assert again.uploads() == {name(0), name(2)}
    again.begin(name(2), LAYOUT)
    assert list(again.chunks(name(2), LAYOUT)) == sealed(name(2))


def test_an_update_cannot_contain_a_header_of_another(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    fd, victim = spool._slots.place(name(2))
    header = os.pread(fd, 64, victim - 64)
    spool.close()
    # The device whose update is in slot 1 copies a true header to where one could begin, and
    # the disk loses the header of its own slot.
    file = tmp_path / "shared.updates"
    data = bytearray(file.read_bytes())
    slot = len(data) // 4096 // 3 * 4096
    data[slot + 4096 : slot + 4096 + 64] = bytes(64)
    data[slot + 8192 : slot + 8192 + 64] = header
    file.write_bytes(data)
    again = opened(tmp_path)
    again.begin(name(2), LAYOUT)
    assert list(again.chunks(name(2), LAYOUT)) == sealed(name(2))


def test_after_a_sync_that_failed_everything_since_is_asked_for_again(tmp_path: Path) -> None:
    class Failing(RealDisk):
        fails = False

        def fdatasync(self, fds):
            return [OSError(5, "EIO")] * len(fds) if self.fails else super().fdatasync(fds)

    disk = Failing()
    spool = opened(tmp_path, disk)
    put(spool, name(0))
    spool.sync([name(0)])
    put(spool, name(1))
    put(spool, name(2))
    disk.fails = True
    with pytest.raises(LocalError, match=r"shared\.updates"):
        spool.sync([name(1)])
    disk.fails = False
    assert spool.complete(name(0))
    assert spool.lacks(name(1)) == spool.lacks(name(2)) == LAYOUT.count
    put(spool, name(1))
    spool.sync([name(1)])
    again = opened(tmp_path)
    again.begin(name(1), LAYOUT)
    assert list(again.chunks(name(1), LAYOUT)) == sealed(name(1))


NAMES = st.integers(0, 3)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["begin", "put"]), NAMES, st.integers(0, len(LAYOUTS) - 1)),
    st.tuples(st.sampled_from(["put", "put", "forget", "drop", "read"]), NAMES, st.integers(0, 2)),
    st.tuples(st.just("sync"), st.sets(NAMES, min_size=1)),
    st.tuples(st.just("restart"), st.booleans()),
    st.just(("clear",)),
    st.tuples(
        st.just("fail"),
        st.sampled_from([errno.ENOSPC, errno.EIO]),
        st.integers(0, 5),
        st.integers(1, 6),
    ),
)


# What it takes chance long to find: a group that is given up, a chunk that is put again after a
# sync, and several chunks after a sync that failed.
GIVEN_UP = [("put", 0, 0), ("fail", 5, 0, 3), ("sync", {0}), ("fail", 5, 0, 0), ("sync", {0})]
PUT_AGAIN = [("put", 0, 0), ("sync", {0}), ("forget", 0, 0), ("put", 0, 0), ("sync", {0})]
SEVERAL = [("put", 0, 3), ("fail", 5, 0, 1), ("sync", {0}), ("put", 0, 3), ("sync", {0})]


@settings(max_examples=400)
@example(0, GIVEN_UP)
@example(0, PUT_AGAIN)
@example(1, SEVERAL)
@example(3, SEVERAL)
@example(5, SEVERAL)
@example(7, SEVERAL)
@given(st.integers(0, 2**32), st.lists(STEPS, max_size=25))
def test_whatever_fails_and_dies_what_was_promised_is_there_and_nothing_that_was_not_put(
    seed: int, steps: list[tuple]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_WAITING_BYTES_MAX", 9_000)
        model = ModelledSpool(seed)
        for what, *how in steps:
            model.do(what, *how)
            model.check()
        model.restart(power=bool(seed & 1))
        model.check()


class Small(RealDisk):
    """Takes `room` bytes more; then each write that adds to them finds the disk full."""

    room = 2**40

    def pwrite(self, fd, data, offset):
        taken = bytes(data)[: self.room]
        self.room -= len(taken)
        if not taken:
            raise OSError(errno.ENOSPC, "full")
        return super().pwrite(fd, taken, offset)

    def pwritev(self, fd, buffers, offset):
        return self.pwrite(fd, b"".join(buffers), offset)


ONE = Layout(3_000, 3_000)


def half_written(folder: Path, *uploads: bytes) -> tuple[Spool, Small]:
    """A spool whose disk was full in the middle of the second slot of a group."""
    disk = Small()
    spool = opened(folder, disk)
    put(spool, b"upload-0", LAYOUT)
    for upload in uploads:
        put(spool, upload, ONE)
    disk.room = 4096 + 100
    with pytest.raises(DiskFullError):
        spool.sync(uploads)
    disk.room = 2**40
    return spool, disk


def test_an_update_that_is_dropped_after_it_was_half_written_is_gone_after_a_kill(
    tmp_path: Path,
) -> None:
    spool, _ = half_written(tmp_path, name(1), name(2))
    spool.drop(name(1))
    spool.drop(name(2))
    assert opened(tmp_path).uploads() == {b"upload-0"}


def test_an_update_that_was_half_written_elsewhere_before_is_the_one_that_was_synced(
    tmp_path: Path,
) -> None:
    spool, _ = half_written(tmp_path, name(1), name(2))
    fd, start = spool._slots._fd, spool._slots._slots[name(2)].start
    before = os.pread(fd, 4096, start)
    spool.drop(name(2))
    spool.drop(name(1))
    put(spool, name(2), ONE)
    spool.sync([name(2)])
    assert spool._slots._slots[name(2)].start < start
    os.pwrite(fd, before, start)  # as a power cut may leave it
    again = opened(tmp_path)
    again.begin(name(2), ONE)
    assert list(again.chunks(name(2), ONE)) == sealed(name(2), ONE)


@pytest.mark.parametrize("seed", range(4))
def test_a_sync_that_fails_with_every_write_after_it_costs_no_later_promise(seed: int) -> None:
    model = ModelledSpool(seed)
    model.do("put", 1, 0)
    model.fail(errno.EIO, 1, 20)  # one write, and then nothing
    model.do("sync", {1})
    model.fail(0, 0, 0)
    model.do("put", 1, 0)
    model.do("sync", {1})
    model.restart(power=True)
    model.check()
    assert model.uploads[b"upload-1"].there == {0}


def test_an_update_that_waits_can_be_read_from_a_full_disk(tmp_path: Path) -> None:
    disk = Small()
    spool = opened(tmp_path, disk)
    put(spool, name(1), ONE)
    disk.room = 0
    assert list(spool.chunks(name(1), ONE)) == sealed(name(1), ONE)


def test_what_a_clear_removed_that_failed_half_way_is_not_back_after_a_kill(tmp_path: Path) -> None:
    class Stubborn(RealDisk):
        fails = True

        def unlink(self, path):
            if self.fails:
                raise OSError(errno.EIO, "no")
            super().unlink(path)

    disk = Stubborn()
    spool = opened(tmp_path, disk)
    for number in range(3):
        put(spool, name(number))
    with pytest.raises(LocalError):
        spool.clear()
    (left,) = spool.uploads()
    assert spool.complete(left)
    assert opened(tmp_path).uploads() == {left}
    disk.fails = False
    spool.clear()
    assert (names(tmp_path), spool.bytes_held) == ([], 0)


def test_a_chunk_that_could_not_be_forgotten_in_full_is_asked_for_again(tmp_path: Path) -> None:
    disk = Small()
    spool = opened(tmp_path, disk)
    put(spool, name(1))
    disk.room = 10
    with pytest.raises(DiskFullError):
        spool.forget(name(1), 4)
    disk.room = 2**40
    put(spool, name(1))
    spool.sync([name(1)])
    assert list(spool.chunks(name(1), LAYOUT)) == sealed(name(1))
