"""Many small updates in one file, so that a group of them needs one sync and no new file.

A slot is a header of 64 bytes (whose it is, and how its update is cut) and room for the
sealed update, in whole blocks of 4096 bytes, so that no write to one slot can tear
another. A restart finds the slots by their headers; a header that the disk lost is passed
over block by block. What is in a slot is ciphertext that a device chose, so headers carry
a digest under a secret of the file: no update can contain one. A header is written with the
first chunk: on its own it would be a block more for the disk, and say nothing.

The file goes when its last slot is given back. Nothing is durable before a sync.
"""

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from broker_bridge.disk import Disk, disk_errors, write_all
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, Layout

__all__ = ["Slots"]

_BLOCK_BYTES = 4096
_HEADER = struct.Struct("<4sI8sQQ")  # magic, in use, upload, total bytes, body bytes
_HEADER_BYTES = 64
_MAGIC = b"mgsl"
_SECRET_BYTES = 32


@dataclass(frozen=True)
class _Slot:
    start: int
    layout: Layout

    @property
    def size_bytes(self) -> int:
        sealed = self.layout.total_bytes + self.layout.count * CHUNK_OVERHEAD_BYTES
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
        self._slots: dict[bytes, _Slot] = {}
        self._unwritten: dict[bytes, bytes] = {}  # headers, by upload, that wait for a chunk
        self._free: dict[int, list[int]] = {}
        with disk_errors(path):
            if disk.exists(path):
                self._fd = disk.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                self._scan()
                if not self._slots:
                    self._remove()

    def __contains__(self, upload: bytes) -> bool:
        return upload in self._slots

    def found(self) -> dict[bytes, int]:
        """The uploads that have a slot, and how many bytes each takes."""
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
        with disk_errors(self.path):
            if new:
                self._create()
            size = _Slot(0, layout).size_bytes
            free = self._free.get(size)
            slot = _Slot(free[-1] if free else self._end, layout)
            if free:  # chunks of before must not be taken for chunks of now
                write_all(self._fd, bytes(size), slot.start, disk=self._disk)
        if free:
            free.pop()
        else:
            self._end += size
        self._slots[upload] = slot
        self._unwritten[upload] = self._header(slot, upload, in_use=1)
        return new

    def write(self, upload: bytes, data: bytes, offset: int) -> None:
        """Write `data` at `offset` of the sealed update. Raises OSError."""
        slot = self._slots[upload]
        start = slot.start + _HEADER_BYTES + offset
        header = self._unwritten.get(upload)
        if header is not None:
            if offset == 0:
                data, start = header + data, slot.start
            else:
                write_all(self._fd, header, slot.start, disk=self._disk)
        write_all(self._fd, data, start, disk=self._disk)
        self._unwritten.pop(upload, None)

    def place(self, upload: bytes) -> tuple[int, int]:
        """The descriptor, and where in the file the sealed update starts."""
        return self._fd, self._slots[upload].start + _HEADER_BYTES

    @property
    def file(self) -> int:
        """The descriptor; valid while a slot is in use."""
        return self._fd

    def give_back(self, upload: bytes, *, file_stays: bool = True) -> None:
        """The slot is free for another. Raises LocalError; then it is still in use.

        Unless the `file_stays`, nothing is written: it goes with its last slot, and should it
        come back, so does every update in it.
        """
        slot = self._slots[upload]
        last = len(self._slots) == 1
        with disk_errors(self.path):
            if last:
                self._remove()
            elif file_stays and upload not in self._unwritten:
                self._write_header(slot, upload, in_use=0)
        del self._slots[upload]
        self._unwritten.pop(upload, None)
        if not last:
            self._free.setdefault(slot.size_bytes, []).append(slot.start)

    def write_again(self, upload: bytes) -> None:
        """Write what says whose slot this is once more: a sync failed since. Raises LocalError."""
        with disk_errors(self.path):
            write_all(self._fd, self._secret, 0, disk=self._disk)
            if upload not in self._unwritten:
                self._write_header(self._slots[upload], upload, in_use=1)

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
            slot = _Slot(start, Layout(total_bytes, body_bytes))
        except PeerError as error:
            raise LocalError(f"{self.path} is damaged: {error}") from None
        if in_use:
            self._slots[upload] = slot
        else:
            self._free.setdefault(slot.size_bytes, []).append(start)
        return slot.size_bytes
