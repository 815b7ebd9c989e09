"""The sealed update on disk: what survives a power cut between training and receipt.

Holds at most one update, as ciphertext, never a key or a plaintext, and gives the
same bytes back however often it is asked. What is not whole on disk is never sent.
`find` only looks, beside a device at work as well; everything else is for the agent alone.
"""

import contextlib
import logging
import os
import struct
from pathlib import Path

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, make_folder, sync_folder, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import SealedUpdate

__all__ = ["DamagedOutboxError", "Outbox"]

log = logging.getLogger("midge.device")

_PREFIX = struct.Struct("<8sI")
_MAGIC = b"mgoutbx1"


class DamagedOutboxError(LocalError):
    """The update was written whole or not at all, so this is damage to the card."""


class Outbox:
    """The file `update.sealed` in a folder of the device, which is made when it is needed."""

    def __init__(self, folder: Path, *, disk: Disk = REAL_DISK) -> None:
        self._disk = disk
        self._path = folder / "update.sealed"
        self._is_made = False
        self._init: Init | None = None
        self._start = 0

    def put(self, init: Init, update: SealedUpdate) -> None:
        """Keep `update`; when this returns, it survives. Replaces an older one.

        Raises LocalError (DiskFullError) and keeps what it had.
        """
        head = messages.encode(init)
        if not self._is_made:
            make_folder(self._path.parent, disk=self._disk)
            self._is_made = True
        parts = (_PREFIX.pack(_MAGIC, len(head)), head, *update.chunks)
        write_atomic(self._path, b"".join(parts), disk=self._disk)
        self._init, self._start = init, _PREFIX.size + len(head)

    def load(self) -> Init | None:
        """The commit of the update that is kept, or None. A damaged one is thrown away.

        It survives when this returns, also where an earlier process failed to sync it.
        """
        try:
            self._init, self._start = self._look() or (None, 0)
            if self._init is not None:
                sync_folder(self._path.parent, disk=self._disk)
        except DamagedOutboxError as error:
            # Its round is trained again, under a new key.
            log.warning("%s; it is thrown away, and trained again if its round is open", error)
            self.discard()
        return self._init

    def find(self) -> Init | None:
        """The commit of the update on the disk, or None. Changes nothing.

        Raises DamagedOutboxError.
        """
        found = self._look()
        return None if found is None else found[0]

    def chunk(self, upload: bytes, index: int) -> bytes:
        """Chunk `index` of the update, as it was first sealed."""
        init = self._init
        if init is None or init.upload != upload:
            raise LocalError(f"{self._path}: this update is no longer in the outbox")
        layout = init.layout
        offset = self._start + index * (layout.body_bytes + CHUNK_OVERHEAD_BYTES)
        return self._read(layout.size(index) + CHUNK_OVERHEAD_BYTES, offset)

    def discard(self) -> None:
        """Forget the update: it has its final answer, or its round is over."""
        with disk_errors(self._path), contextlib.suppress(FileNotFoundError):  # nor its folder
            self._disk.unlink(self._path)
        self._init = None

    def _look(self) -> tuple[Init, int] | None:
        """The commit, and where the chunks begin."""
        with disk_errors(self._path):
            try:
                # Opened once: whoever looks while the next update takes its place sees one of both.
                fd = self._disk.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                return self._read_head(fd)
            except (PeerError, struct.error):
                raise DamagedOutboxError(f"{self._path}: the update in it is damaged") from None
            finally:
                self._disk.close(fd)

    def _read_head(self, fd: int) -> tuple[Init, int]:
        read = self._disk.pread
        magic, length = _PREFIX.unpack(read(fd, _PREFIX.size, 0))
        if magic != _MAGIC or length > LIMITS.control_bytes_max:
            raise PeerError("bad_outbox")
        init: Init = messages.decode(read(fd, length, _PREFIX.size), Init)
        start = _PREFIX.size + length
        end = start + init.total_bytes + init.layout.count * CHUNK_OVERHEAD_BYTES
        if len(read(fd, 2, end - 1)) != 1:
            raise PeerError("bad_outbox")
        return init, start

    def _read(self, length: int, offset: int) -> bytes:
        with disk_errors(self._path):
            fd = self._disk.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._disk.pread(fd, length, offset)
            finally:
                self._disk.close(fd)
