"""The sealed update on disk: what survives a power cut between training and receipt.

Holds at most one update, as ciphertext, never a key or a plaintext, and gives the
same bytes back however often it is asked. What is not whole on disk does not exist.
"""

import os
import struct
from pathlib import Path

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import SealedUpdate

__all__ = ["Outbox"]

_PREFIX = struct.Struct("<8sI")
_MAGIC = b"mgoutbx1"


class Outbox:
    """The file `update.sealed` in a folder of the device."""

    def __init__(self, folder: Path) -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / "update.sealed"
        self._init: Init | None = None
        self._start = 0

    def put(self, init: Init, update: SealedUpdate) -> None:
        """Keep `update`; when this returns, it survives. Replaces an older one.

        Raises LocalError (DiskFullError) and keeps what it had.
        """
        head = messages.encode(init)
        parts = (_PREFIX.pack(_MAGIC, len(head)), head, *update.chunks)
        write_atomic(self._path, b"".join(parts))
        self._init, self._start = init, _PREFIX.size + len(head)

    def load(self) -> Init | None:
        """The commit of the update that is kept, or None."""
        if not self._path.exists():
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
        with disk_errors(self._path):
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(fd, layout.size(index) + CHUNK_OVERHEAD_BYTES, offset)
            finally:
                os.close(fd)

    def discard(self) -> None:
        """Forget the update: it has its final answer, or its round is over."""
        with disk_errors(self._path):
            self._path.unlink(missing_ok=True)
        self._init = None

    def _read_head(self) -> tuple[Init, int]:
        with disk_errors(self._path), self._path.open("rb") as file:
            magic, length = _PREFIX.unpack(file.read(_PREFIX.size))
            if magic != _MAGIC:
                raise PeerError("bad_outbox")
            init: Init = messages.decode(file.read(length), Init)
            start = _PREFIX.size + length
            layout = init.layout
            whole = init.total_bytes + layout.count * CHUNK_OVERHEAD_BYTES
            if self._path.stat().st_size != start + whole:
                raise PeerError("bad_outbox")
        return init, start
