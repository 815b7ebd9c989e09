"""Many small updates in one file, so that a group of them needs one sync and no new file.

A slot is a header of 64 bytes (whose it is, and how its update is cut) and room for the
sealed update, in whole blocks of 4096 bytes, so that no write to one slot can tear
another. A restart finds the slots by their headers; a header that the disk lost is passed
over block by block. What is in a slot is ciphertext that a device chose, so headers carry
a digest under a secret of the file: no update can contain one. A header is written with the
first chunk: on its own it would be a block more for the disk, and say nothing. It has a
number, higher than those of before: should the disk fail in between, an upload that was
dropped and begun anew may have two headers, and the later one counts.

Nor has a slot a place in the file before that. So updates of one chunk, which wait in memory
for their group, come to lie one after the other, and one call writes them all: half the
time or less (`bench_ingest` prints both, docs/decisions/0139).

The file goes when its last slot is given back. Nothing is durable before a sync.
"""

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from broker_bridge.disk import Disk, disk_errors, write_all, write_one_after_the_other
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, Layout

__all__ = ["Slots"]

_BLOCK_BYTES = 4096
_HEADER = struct.Struct("<4sI8sQQ")  # magic, number or 0 if free, upload, total bytes, body bytes
_HEADER_BYTES = 64
_MAGIC = b"mgsl"
_SECRET_BYTES = 32
_WAITING_BYTES_MAX = 4 * 1024 * 1024
_RUN_MAX = 256  # slots in one call


class _Slot(NamedTuple):
    start: int
    layout: Layout
    size_bytes: int
    number: int


def _size_bytes(layout: Layout) -> int:
    sealed = layout.total_bytes + layout.count * CHUNK_OVERHEAD_BYTES
    return -(-(_HEADER_BYTES + sealed) // _BLOCK_BYTES) * _BLOCK_BYTES


class Slots:
    """The file `path`, which is there while a slot is in use."""

    def __init__(self, path: Path, *, disk: Disk, random: Callable[[int], bytes]) -> None:
        """Find what an earlier process left. Raises LocalError."""
        self.path = path
        self._disk = disk
        self._random = random
        self._fd = -1
        self._secret = b""
        self._is_secret_there = False  # written, and no sync failed since
        self._number = 0  # of the last slot
        self._end = _BLOCK_BYTES
        self._unplaced: dict[bytes, Layout] = {}  # uploads that have no place in the file yet
        self._slots: dict[bytes, _Slot] = {}  # those that have one
        self._unwritten: set[bytes] = set()  # of these: those whose header may not be there
        self._waiting: dict[bytes, bytes] = {}  # whole updates, for `flush`
        self._waiting_bytes = 0
        self._free: dict[int, list[int]] = {}
        with disk_errors(path):
            if disk.exists(path):
                self._fd = disk.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._scan()
                if not self._slots:
                    self._remove()

    def __contains__(self, upload: bytes) -> bool:
        return upload in self._slots or upload in self._unplaced

    def found(self) -> dict[bytes, int]:
        """The uploads that have a slot in the file, and how many bytes each takes."""
        return {
            upload: slot.layout.total_bytes + slot.layout.count * CHUNK_OVERHEAD_BYTES
            for upload, slot in self._slots.items()
        }

    def layout(self, upload: bytes) -> Layout:
        """How the update in this slot is cut."""
        return self._slots[upload].layout

    def take(self, upload: bytes, layout: Layout) -> bool:
        """Give an upload a slot; say whether the file is new. Raises DiskFullError, LocalError."""
        new = self._fd < 0
        if new:
            with disk_errors(self.path):
                self._create()
        self._unplaced[upload] = layout
        return new

    def write(self, upload: bytes, data: bytes, offset: int) -> None:
        """Write `data` at `offset` of the sealed update. Raises OSError."""
        slot = self._placed(upload)
        start = slot.start + _HEADER_BYTES + offset
        if upload in self._unwritten:
            header = self._header(slot, upload, slot.number)
            if offset == 0:
                data, start = header + data, slot.start
            else:
                write_all(self._fd, header, slot.start, disk=self._disk)
        write_all(self._fd, data, start, disk=self._disk)
        self._unwritten.discard(upload)

    def write_later(self, upload: bytes, data: bytes) -> None:
        """Write a whole sealed update with the next `flush`.

        Raises OSError when too many wait and cannot be written: this one does not wait then.
        """
        if self._waiting_bytes + len(data) > _WAITING_BYTES_MAX:
            self.flush()
        self._waiting_bytes += len(data) - len(self._waiting.get(upload, b""))
        self._waiting[upload] = data

    def flush(self) -> None:
        """Write whatever waits. Raises OSError: then all of it waits as before."""
        if not self._is_secret_there:
            self._write_secret()
        run: list[bytes] = []
        start = end = 0
        for upload, data in self._waiting.items():
            slot = self._placed(upload)
            if slot.start != end or len(run) >= 3 * _RUN_MAX:
                write_one_after_the_other(self._fd, run, start, disk=self._disk)
                run, start = [], slot.start
            header = self._header(slot, upload, slot.number)
            run += header, data, bytes(slot.size_bytes - len(header) - len(data))
            end = slot.start + slot.size_bytes
        write_one_after_the_other(self._fd, run, start, disk=self._disk)
        self._unwritten.difference_update(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

    def at_hand(self, upload: bytes) -> bytes | None:
        """The whole sealed update, if it waits to be written."""
        return self._waiting.get(upload)

    def give_up(self) -> list[bytes]:
        """Forget what waits to be written; the uploads whose it was keep their slots."""
        lost = list(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        return lost

    def _placed(self, upload: bytes) -> _Slot:
        """The upload's slot, which has a place from now on. Raises OSError."""
        slot = self._slots.get(upload)
        if slot is not None:
            return slot
        layout = self._unplaced[upload]
        size = _size_bytes(layout)
        free = self._free.get(size)
        if free:  # chunks of before must not be taken for chunks of now
            write_all(self._fd, bytes(size), free[-1], disk=self._disk)
            start = free.pop()
        else:
            start = self._end
            self._end += size
        self._number += 1
        slot = self._slots[upload] = _Slot(start, layout, size, self._number)
        self._unwritten.add(upload)
        del self._unplaced[upload]
        return slot

    def place(self, upload: bytes) -> tuple[int, int]:
        """The descriptor, and where in the file the sealed update starts. Raises OSError."""
        if upload in self._waiting:
            self.flush()
        return self._fd, self._placed(upload).start + _HEADER_BYTES

    @property
    def file(self) -> int:
        """The descriptor; valid while a slot is in use."""
        return self._fd

    def give_back(self, upload: bytes) -> None:
        """The slot is free for another. Raises LocalError; then it is still in use."""
        if len(self._slots) + len(self._unplaced) == 1:
            self.clear()
            return
        slot = self._slots.get(upload)
        if slot is None:
            del self._unplaced[upload]
        else:
            with disk_errors(self.path):
                if self._has_header(slot, upload):
                    write_all(self._fd, self._header(slot, upload, 0), slot.start, disk=self._disk)
            del self._slots[upload]
            self._unwritten.discard(upload)
            self._free.setdefault(slot.size_bytes, []).append(slot.start)
        self._waiting_bytes -= len(self._waiting.pop(upload, b""))

    def _has_header(self, slot: _Slot, upload: bytes) -> bool:
        """Whether a restart would find it. A write that failed may have come that far."""
        if upload not in self._unwritten:
            return True
        header = self._header(slot, upload, slot.number)
        return self._disk.pread(self._fd, _HEADER_BYTES, slot.start) == header

    def distrust(self, upload: bytes) -> None:
        """A sync failed: what says whose slot this is is written again with its next chunk."""
        self._is_secret_there = False
        if upload in self._slots:
            self._unwritten.add(upload)

    def clear(self) -> None:
        """Every slot goes, and the file. Raises LocalError; then all are still in use.

        No slot is written to. Should the file come back, so does every update in it.
        """
        with disk_errors(self.path):
            if self._fd >= 0:
                self._remove()
        self._unplaced.clear()
        self._slots.clear()
        self._unwritten.clear()
        self.give_up()

    def _remove(self) -> None:
        self._disk.unlink(self.path)
        self.close()
        self._free.clear()
        self._end = _BLOCK_BYTES

    def close(self) -> None:
        """Close the file; nothing is written."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    # ── The file ────────────────────────────────────────────────────────────────────────

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = self._disk.open(self.path, flags, 0o600)
        self._secret = self._random(_SECRET_BYTES)
        self._fd = fd
        try:
            self._write_secret()
        except OSError:
            self.close()
            raise

    def _write_secret(self) -> None:
        write_all(self._fd, self._secret, 0, disk=self._disk)
        self._is_secret_there = True

    def _header(self, slot: _Slot, upload: bytes, number: int) -> bytes:
        fields = _HEADER.pack(
            _MAGIC, number, upload, slot.layout.total_bytes, slot.layout.body_bytes
        )
        return fields + self._digest(fields, slot.start)

    def _digest(self, fields: bytes, start: int) -> bytes:
        return hashlib.sha256(self._secret + fields + start.to_bytes(8, "little")).digest()

    def _scan(self) -> None:
        self._secret = self._disk.pread(self._fd, _SECRET_BYTES, 0)
        self._is_secret_there = True
        size, start = self._disk.size(self.path), _BLOCK_BYTES
        while start < size:
            start += self._find(start)
        self._end = max(start, _BLOCK_BYTES)

    def _find(self, start: int) -> int:
        """Take in the slot that begins here, if one does; return how far to go on."""
        head = self._disk.pread(self._fd, _HEADER_BYTES, start)
        fields = head[: _HEADER.size]
        if len(head) < _HEADER_BYTES or head[_HEADER.size :] != self._digest(fields, start):
            return _BLOCK_BYTES
        _, number, upload, total_bytes, body_bytes = _HEADER.unpack(fields)
        try:
            layout = Layout(total_bytes, body_bytes)
        except PeerError as error:
            raise LocalError(f"{self.path} is damaged: {error}") from None
        self._take_in(upload, _Slot(start, layout, _size_bytes(layout), number))
        return _size_bytes(layout)

    def _take_in(self, upload: bytes, slot: _Slot) -> None:
        """A slot of an earlier process: in use, free, or one that a later one took the place of."""
        free: _Slot | None = slot
        if slot.number:
            self._number = max(self._number, slot.number)
            other = self._slots.get(upload)
            if other is None or other.number <= slot.number:
                self._slots[upload], free = slot, other
        if free is not None:
            self._free.setdefault(free.size_bytes, []).append(free.start)
