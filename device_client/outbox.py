"""The sealed update on disk: what survives a power cut between training and receipt.

Holds at most one update, as ciphertext, never a key or a plaintext, and gives the
same bytes back however often it is asked. What is not whole on disk does not exist.
"""

import os
import struct
from pathlib import Path

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, make_folder, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import SealedUpdate

__all__ = ["Outbox"]

_PREFIX = struct.Struct("<8sI")
_MAGIC = b"mgoutbx1"


class Outbox:
    """The file `update.sealed` in a folder of the device."""

    def __init__(self, folder: Path, *, disk: Disk = REAL_DISK) -> None:
        make_folder(folder, disk=disk)
        self._disk = disk
        self._path = folder / "update.sealed"
        self._init: Init | None = None
        self._start = 0

    def put(self, init: Init, update: SealedUpdate) -> None:
        """Keep `update`; when this returns, it survives. Replaces an older one.

        Raises LocalError (DiskFullError) and keeps what it had.
        """
        head = messages.encode(init)
        parts = (_PREFIX.pack(_MAGIC, len(head)), head, *update.chunks)
        write_atomic(self._path, b"".join(parts), disk=self._disk)
        self._init, self._start = init, _PREFIX.size + len(head)

    def load(self) -> Init | None:
        """The commit of the update that is kept, or None."""
        if not self._disk.exists(self._path):
            return None
        try:
            self._init, self._start = self._read_head()
        except (PeerError, struct.error):
            # Written whole or not at all, so this is damage to the card: the round is
            # trained again under a new key.
            self.discard()
            return None
        return self._init

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
        with disk_errors(self._path):
            self._disk.unlink(self._path)
        self._init = None

    def _read_head(self) -> tuple[Init, int]:
        magic, length = _PREFIX.unpack(self._read(_PREFIX.size, 0))
        if magic != _MAGIC or length > LIMITS.control_bytes_max:
            raise PeerError("bad_outbox")
        init: Init = messages.decode(self._read(length, _PREFIX.size), Init)
        start = _PREFIX.size + length
        whole = init.total_bytes + init.layout.count * CHUNK_OVERHEAD_BYTES
        with disk_errors(self._path):
            if self._disk.size(self._path) != start + whole:
                raise PeerError("bad_outbox")
        return init, start

    def _read(self, length: int, offset: int) -> bytes:
        with disk_errors(self._path):
            fd = self._disk.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._disk.pread(fd, length, offset)
            finally:
                self._disk.close(fd)
