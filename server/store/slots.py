"""Many small updates in one file, so that a group of them needs one sync and no new file.

A slot is a header of 64 bytes (whose it is, and how its update is cut) and room for the
sealed update, in whole blocks of 4096 bytes, so that no write to one slot can tear
another. A restart finds the slots by their headers; a header that the disk lost is passed
over block by block. What is in a slot is ciphertext that a device chose, so headers carry
a digest under a secret of the file: no update can contain one. A header is written with the
first chunk: on its own it would be a block more for the disk, and say nothing.

Nor has a slot a place in the file before that. So updates of one chunk, which wait in memory
for their group, come to lie one after the other, and one call writes them all: the kernel
takes a third of the time for that (docs/decisions/0139).

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
_HEADER = struct.Struct("<4sI8sQQ")  # magic, in use, upload, total bytes, body bytes
_HEADER_BYTES = 64
_MAGIC = b"mgsl"
_SECRET_BYTES = 32
_WAITING_BYTES_MAX = 4 * 1024 * 1024
_RUN_MAX = 256  # slots in one call


class _Slot(NamedTuple):
    start: int
    layout: Layout
    size_bytes: int


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
        self._end = _BLOCK_BYTES
        self._unplaced: dict[bytes, Layout] = {}  # uploads that have no place in the file yet
        self._slots: dict[bytes, _Slot] = {}  # those that have one
        self._unwritten: set[bytes] = set()  # of these: those without a header there
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
            header = self._header(slot, upload, in_use=1)
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
        self._waiting[upload] = data
        self._waiting_bytes += len(data)

    def flush(self) -> None:
        """Write whatever waits. Raises OSError: then all of it waits as before."""
        run: list[bytes] = []
        start = end = 0
        for upload, data in self._waiting.items():
            slot = self._placed(upload)
            if slot.start != end or len(run) >= 3 * _RUN_MAX:
                write_one_after_the_other(self._fd, run, start, disk=self._disk)
                run, start = [], slot.start
            header = self._header(slot, upload, in_use=1)
            run += header, data, bytes(slot.size_bytes - len(header) - len(data))
            end = slot.start + slot.size_bytes
        write_one_after_the_other(self._fd, run, start, disk=self._disk)
        self._unwritten.difference_update(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

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
        slot = self._slots[upload] = _Slot(start, layout, size)
        self._unwritten.add(upload)
        del self._unplaced[upload]
        return slot

    def place(self, upload: bytes) -> tuple[int, int]:
        """The descriptor, and where in the file the sealed update starts. Raises OSError."""
        self.flush()
        return self._fd, self._placed(upload).start + _HEADER_BYTES

    @property
    def file(self) -> int:
        """The descriptor; valid while a slot is in use."""
        return self._fd

    def give_back(self, upload: bytes, *, file_stays: bool = True) -> None:
        """The slot is free for another. Raises LocalError; then it is still in use.

        Unless the `file_stays`, nothing is written: it goes with its last slot, and should it
        come back, so does every update in it.
        """
        slot = self._slots.get(upload)
        last = len(self._slots) + len(self._unplaced) == 1
        with disk_errors(self.path):
            if last:
                self._remove()
            elif slot is not None and file_stays and upload not in self._unwritten:
                self._write_header(slot, upload, in_use=0)
        self._waiting_bytes -= len(self._waiting.pop(upload, b""))
        if slot is None:
            del self._unplaced[upload]
            return
        del self._slots[upload]
        self._unwritten.discard(upload)
        if not last:
            self._free.setdefault(slot.size_bytes, []).append(slot.start)

    def write_again(self, upload: bytes) -> None:
        """Write what says whose slot this is once more: a sync failed since. Raises LocalError."""
        with disk_errors(self.path):
            write_all(self._fd, self._secret, 0, disk=self._disk)
            slot = self._slots.get(upload)
            if slot is not None and upload not in self._unwritten:
                self._write_header(slot, upload, in_use=1)

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
        try:
            write_all(fd, self._secret, 0, disk=self._disk)
        except OSError:
            self._disk.close(fd)
            raise
        self._fd = fd

    def _write_header(self, slot: _Slot, upload: bytes, *, in_use: int) -> None:
        header = self._header(slot, upload, in_use=in_use)
        write_all(self._fd, header, slot.start, disk=self._disk)

    def _header(self, slot: _Slot, upload: bytes, *, in_use: int) -> bytes:
        fields = _HEADER.pack(
            _MAGIC, in_use, upload, slot.layout.total_bytes, slot.layout.body_bytes
        )
        return fields + self._digest(fields, slot.start)

    def _digest(self, fields: bytes, start: int) -> bytes:
        return hashlib.sha256(self._secret + fields + start.to_bytes(8, "little")).digest()

    def _scan(self) -> None:
        self._secret = self._disk.pread(self._fd, _SECRET_BYTES, 0)
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
        _, in_use, upload, total_bytes, body_bytes = _HEADER.unpack(fields)
        try:
            layout = Layout(total_bytes, body_bytes)
        except PeerError as error:
            raise LocalError(f"{self.path} is damaged: {error}") from None
        slot = _Slot(start, layout, _size_bytes(layout))
        if in_use:
            self._slots[upload] = slot
        else:
            self._free.setdefault(slot.size_bytes, []).append(start)
        return slot.size_bytes
