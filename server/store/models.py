"""Model files: `000012.weights`, and beside it `000012.optimiser`, the server optimiser's state.

A file is written whole or not at all, and read only if its digest is the one that the
database (or whoever asks) remembers. The files of a version are never changed: writing
the same version again is for the round that was interrupted and makes the same bytes.
"""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from broker_bridge.disk import REAL_DISK, Disk, disk_errors, make_folder, write_atomic
from broker_bridge.errors import LocalError

__all__ = ["Kind", "ModelFiles"]

Kind = Literal["weights", "optimiser"]
_NAME = re.compile(r"(\d{6,})\.(weights|optimiser)")


class ModelFiles:
    """The folder of model versions. One process writes to it."""

    def __init__(self, folder: Path, *, disk: Disk = REAL_DISK) -> None:
        self.folder = folder
        self._disk = disk
        make_folder(folder, disk=disk)

    def path(self, version: int, kind: Kind = "weights") -> Path:
        """Where a version is, or would be."""
        return self.folder / f"{version:06d}.{kind}"

    def write(self, version: int, data: bytes, *, kind: Kind = "weights") -> bytes:
        """Store what `weights.encode` made; return its SHA-256 once the disk has it.

        Raises DiskFullError or LocalError.
        """
        write_atomic(self.path(version, kind), data, disk=self._disk)
        return hashlib.sha256(data).digest()

    def read(self, version: int, digest: bytes, *, kind: Kind = "weights") -> bytes:
        """Return the bytes whose SHA-256 is `digest`. Raises LocalError naming the file."""
        path = self.path(version, kind)
        with disk_errors(path):
            data = self._disk.read(path)
        if hashlib.sha256(data).digest() != digest:
            raise LocalError(
                f"{path}: this is not the file that was written (its digest differs); "
                "restore it from a backup, or start again from an older version"
            )
        return data

    def versions(self) -> list[int]:
        """The versions whose weights are here, oldest first."""
        return sorted({version for version, kind in self._files() if kind == "weights"})

    def prune(self, keep: int, *, also: Collection[int] = ()) -> list[int]:
        """Remove all but the newest `keep` versions and those in `also`; say which went."""
        if keep < 1:
            raise ValueError("at least the newest model is kept")
        stay = {*self.versions()[-keep:], *also}
        gone = sorted({version for version, _ in self._files() if version not in stay})
        for version in gone:
            self._remove(version)
        return gone

    def _remove(self, version: int) -> None:
        for kind in ("optimiser", "weights"):
            path = self.path(version, kind)
            with disk_errors(path):
                self._disk.unlink(path)

    def _files(self) -> list[tuple[int, str]]:
        with disk_errors(self.folder):
            matches = [_NAME.fullmatch(name) for name in self._disk.names(self.folder)]
        return [(int(m[1]), m[2]) for m in matches if m]
