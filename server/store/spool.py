"""Sealed updates of the open round, on disk until the round is closed.

One file per upload, named by its id. Chunk i, header and all, lies at i · (body + overhead),
so a chunk can come at any time and twice, and a restart finds what is there by reading
the headers at those places: a hole reads as zeros and zeros are no header.

Promised: what was put before `sync(uploads)` returned is there after a power cut, and a
chunk that is there is never overwritten. Not promised: anything else that was put.
It survives a kill of this process, but a power cut can leave a chunk torn, with its header
in place. So whoever opens an update checks every tag, as it must anyway, and calls
`forget` for a chunk that does not open; it is then missing, and asked for again.

A small update (`shared_bytes_max`) has a slot in one file with others instead of a file of
its own: a group of them then costs one sync. If it has one chunk only, that waits in memory
for the sync, so a kill takes it along: nobody was promised it. See slots.py.

One thread of one process uses the folder. Chunks are stored as they came: nothing here
can read them.
"""

import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from broker_bridge.disk import (
    REAL_DISK,
    Disk,
    disk_errors,
    make_folder,
    sync_folder,
    write_all,
)
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.chunks import (
    CHUNK_OVERHEAD_BYTES,
    TRANSFER_ID_BYTES,
    ChunkHeader,
    Layout,
    chunk_header,
)
from broker_bridge.wire.envelope import random_bytes
from server.store.slots import Slots

__all__ = ["Spool"]

_NAME = re.compile(rf"([0-9a-f]{{{2 * TRANSFER_ID_BYTES}}})\.update")
_SHARED_NAME = "shared.updates"
_HANDLES_MAX = 64
_SYNCS_AT_ONCE = 16  # fewer than _HANDLES_MAX: none of their files is closed meanwhile
_HEADER_BYTES = 24


@dataclass
class _Held:
    """An upload that was begun in this process."""

    layout: Layout
    present: set[int] = field(default_factory=set)
    path: Path = field(init=False)  # of the file that it is in
    shared: bool = field(init=False)  # whether that has slots for others, too

    @property
    def file_bytes(self) -> int:
        return self.layout.total_bytes + self.layout.count * CHUNK_OVERHEAD_BYTES


class Spool:
    """The folder of sealed updates. Everything but `uploads` needs the upload to be begun."""

    def __init__(
        self,
        folder: Path,
        *,
        shared_bytes_max: int = 0,
        disk: Disk = REAL_DISK,
        random: Callable[[int], bytes] = random_bytes,
    ) -> None:
        self.folder = folder
        self._disk = disk
        self._held: dict[bytes, _Held] = {}
        self._synced: set[bytes] = set()  # those of which the disk has whatever was put
        self._handles: OrderedDict[bytes, int] = OrderedDict()
        make_folder(folder, disk=disk)
        with disk_errors(folder):
            found = [name for name in disk.names(folder) if _NAME.fullmatch(name)]
            self._found = {bytes.fromhex(n[:-7]): disk.size(folder / n) for n in found}
        self._shared_bytes_max = shared_bytes_max
        self._slots = Slots(folder / _SHARED_NAME, disk=disk, random=random)
        self._found |= self._slots.found()
        self._names_synced = False
        self._bytes = sum(self._found.values())

    # ── One upload ──────────────────────────────────────────────────────────────────────

    def begin(self, upload: bytes, layout: Layout) -> None:
        """Make room for an upload, or find it again after a restart. Idempotent.

        Raises PeerError `other_layout` when it was begun with another layout.
        """
        held = self._held.get(upload)
        if held is not None:
            if held.layout != layout:
                raise PeerError("other_layout", "an upload that changes its size")
            return
        if len(upload) != TRANSFER_ID_BYTES:
            raise ValueError(f"an upload id is {TRANSFER_ID_BYTES} bytes")
        if upload in self._slots and self._slots.layout(upload) != layout:
            self._slots.give_back(upload)
            self._bytes -= self._found.pop(upload)
        new = upload not in self._found
        held = _Held(layout, set() if new else self.present(upload, layout))
        if new and held.file_bytes <= self._shared_bytes_max:
            new = self._slots.take(upload, layout)  # a new name only if the file is new
        elif upload not in self._slots:
            self._open(upload, create=True)
        held.path, held.shared = self._path(upload), upload in self._slots
        self._names_synced = self._names_synced and not new
        self._bytes += held.file_bytes - self._found.pop(upload, 0)
        self._held[upload] = held

    def put(self, header: ChunkHeader, chunk: bytes) -> bool:
        """Keep a sealed chunk with this header; False when it is there already: nothing changes.

        Not yet durable: see `sync`. Raises PeerError `bad_chunk` when the chunk does not fit its
        upload, DiskFullError or LocalError when the disk refuses it.
        """
        upload, index = header.transfer, header.index
        held = self._held[upload]
        held.layout.check(header, chunk)
        if index in held.present:
            return False
        start = _start(held.layout, index)
        with disk_errors(held.path):
            if not held.shared:
                write_all(self._open(upload), chunk, start, disk=self._disk)
            elif held.layout.count == 1:
                self._slots.write_later(upload, chunk)
            else:
                self._slots.write(upload, chunk, start)
        held.present.add(index)
        self._synced.discard(upload)
        return True

    def forget(self, upload: bytes, index: int) -> None:
        """Count a chunk as missing again, in this process and after a restart.

        Raises DiskFullError or LocalError; it may be back after a restart then, torn as it was.
        """
        held = self._held[upload]
        if index not in held.present:
            return
        held.present.discard(index)  # first: half a header may be what is left of it
        with disk_errors(self._path(upload)):
            fd, base = self._place(upload)
            start = base + _start(held.layout, index)
            write_all(fd, bytes(_HEADER_BYTES), start, disk=self._disk)

    def missing(self, upload: bytes) -> list[int]:
        """The indices of the chunks that are not there, in order."""
        held = self._held[upload]
        return [i for i in range(held.layout.count) if i not in held.present]

    def lacks(self, upload: bytes) -> int:
        """How many chunks are not there; cheap, for asking after each chunk."""
        held = self._held[upload]
        return held.layout.count - len(held.present)

    def complete(self, upload: bytes) -> bool:
        """Whether every chunk is there (each may still turn out to be torn or forged)."""
        return self.lacks(upload) == 0

    def present(self, upload: bytes, layout: Layout) -> set[int]:
        """The chunks whose header is in its place on disk; none when there is no file."""
        if upload not in self._held and upload not in self._found:
            return set()
        with disk_errors(self._path(upload)):
            place = self._place(upload)
            size = self._disk.size(self._path(upload))
            there = range(layout.count)
            return {i for i in there if self._is_there(place, size, upload, layout, i)}

    def chunks(self, upload: bytes, layout: Layout) -> Iterator[bytes]:
        """Yield every chunk in order, as it was put. Only of a `complete` upload."""
        waiting = self._slots.at_hand(upload)
        if waiting is not None:  # nothing needs to be written for that, nor the disk have room
            yield waiting
            return
        for index in range(layout.count):
            with disk_errors(self._path(upload)):
                length = layout.size(index) + CHUNK_OVERHEAD_BYTES
                fd, base = self._place(upload)
                chunk = self._disk.pread(fd, length, base + _start(layout, index))
            yield chunk

    # ── Many uploads ────────────────────────────────────────────────────────────────────

    def sync(self, uploads: Iterable[bytes]) -> None:
        """Return once the disk has everything that was put into `uploads`: a group commit.

        Raises DiskFullError or LocalError; then nothing is promised for any of them, and
        the chunks of the one that failed are missing again.
        """
        waiting = [upload for upload in uploads if upload not in self._synced]
        shared = [upload for upload in waiting if self._held[upload].shared]
        if shared:
            self._sync_shared(shared)
        alone = [upload for upload in waiting if not self._held[upload].shared]
        for start in range(0, len(alone), _SYNCS_AT_ONCE):
            self._sync_files(alone[start : start + _SYNCS_AT_ONCE])
        if not self._names_synced:
            sync_folder(self.folder, disk=self._disk)
            self._names_synced = True

    def _sync_files(self, uploads: list[bytes]) -> None:
        errors = self._disk.fdatasync([self._open(upload) for upload in uploads])
        outcome = dict(zip(uploads, errors, strict=True))
        self._synced.update(each for each, error in outcome.items() if error is None)
        for upload, error in outcome.items():
            if error is not None:
                self._distrust(upload)
        for upload, error in outcome.items():
            if error is not None:
                with disk_errors(self._path(upload)):
                    raise error

    def _sync_shared(self, uploads: list[bytes]) -> None:
        with disk_errors(self._slots.path):
            try:
                self._slots.flush()
            except OSError:
                for upload in self._slots.give_up():
                    self._held[upload].present.clear()
                raise
        (error,) = self._disk.fdatasync([self._slots.file])
        if error is None:
            self._synced.update(uploads)
            return
        # It may be any page of the file, so nothing that was put since is to be trusted.
        for upload in [each for each in self._held if each in self._slots]:
            if upload not in self._synced:
                self._distrust(upload)
                self._slots.distrust(upload)
        with disk_errors(self._slots.path):
            raise error

    def _distrust(self, upload: bytes) -> None:
        """Ask for every chunk again after a sync that failed.

        The kernel may have let go of the pages, and would call a second sync a success
        without writing them. What is put again is written again.
        """
        held = self._held[upload]
        with contextlib.suppress(LocalError):
            for index in sorted(held.present):
                self.forget(upload, index)
        held.present.clear()

    def drop(self, upload: bytes) -> None:
        """Remove an upload, if it is here. It may be back after a power cut: see `clear`.

        Raises LocalError when the disk refuses; then it is still here, to be dropped again.
        """
        if upload in self._slots:
            self._slots.give_back(upload)
        else:
            self._unlink(upload)
        self._gone(upload)

    def _gone(self, upload: bytes) -> None:
        held = self._held.pop(upload, None)
        self._synced.discard(upload)
        self._bytes -= held.file_bytes if held else self._found.pop(upload, 0)

    def _unlink(self, upload: bytes) -> None:
        handle = self._handles.pop(upload, None)
        path = self._path(upload)
        with disk_errors(path):
            if handle is not None:
                self._disk.close(handle)
            self._disk.unlink(path)

    def clear(self, *, keep: Collection[bytes] = ()) -> None:
        """Remove every upload but those in `keep`, for good: after a round, and after a restart."""
        gone = self.uploads() - set(keep)
        shared = {upload for upload in gone if upload in self._slots}
        if not any(upload in self._slots for upload in keep):
            with contextlib.suppress(LocalError):  # one by one, then, and no more than must stays
                self._slots.clear()
                gone -= shared
                for upload in shared:
                    self._gone(upload)
        for upload in gone:
            self.drop(upload)
        # Also when nothing is left to drop: a process before this one may have died half-way.
        sync_folder(self.folder, disk=self._disk)

    def uploads(self) -> set[bytes]:
        """The uploads that are here, begun in this process or found from an earlier one."""
        return {*self._held, *self._found}

    def __contains__(self, upload: bytes) -> bool:
        """Whether this upload is among them."""
        return upload in self._held or upload in self._found

    @property
    def bytes_held(self) -> int:
        """An upper bound on what the files hold: the full size of each upload begun."""
        return self._bytes

    def close(self) -> None:
        """Close the files. Nothing is written: what was not synced was not promised."""
        while self._handles:
            self._disk.close(self._handles.popitem()[1])
        self._slots.close()

    # ── Files ───────────────────────────────────────────────────────────────────────────

    def _path(self, upload: bytes) -> Path:
        return self._slots.path if upload in self._slots else self.folder / f"{upload.hex()}.update"

    def _place(self, upload: bytes) -> tuple[int, int]:
        """The file with this update, and where in it the update starts."""
        if upload in self._slots:
            return self._slots.place(upload)
        return self._open(upload), 0

    def _open(self, upload: bytes, *, create: bool = False) -> int:
        """The upload's file; the one unused for longest is closed when too many are open."""
        fd = self._handles.get(upload)
        if fd is None:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
            with disk_errors(self._path(upload)):
                fd = self._disk.open(self._path(upload), flags, 0o600)
            self._handles[upload] = fd
            if len(self._handles) > _HANDLES_MAX:
                self._disk.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(upload)
        return fd

    def _is_there(
        self, place: tuple[int, int], size: int, upload: bytes, layout: Layout, index: int
    ) -> bool:
        """Whether the header of chunk `index` is in its place, and the file long enough for it."""
        fd, base = place
        start = base + _start(layout, index)
        end = start + layout.size(index) + CHUNK_OVERHEAD_BYTES
        head = self._disk.pread(fd, CHUNK_OVERHEAD_BYTES, start)
        if end > size or len(head) < CHUNK_OVERHEAD_BYTES:
            return False
        try:
            header = chunk_header(head)
        except PeerError:
            return False
        return (header.transfer, header.index, header.count) == (upload, index, layout.count)


def _start(layout: Layout, index: int) -> int:
    return index * (layout.body_bytes + CHUNK_OVERHEAD_BYTES)
