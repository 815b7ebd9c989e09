"""One agent for one folder, and one folder for one agent, for as long as it runs.

A folder may go away under a device that works in it: a card is pulled out, a disk unmounted, a
folder moved. What stands under that name then is another place. What was written there would be
missed when the true one is back (the highest round seen, for example), so nothing is.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from broker_bridge.disk import RealDisk, disk_errors
from broker_bridge.errors import LocalError

__all__ = ["HeldDisk", "held"]


class HeldDisk(RealDisk):
    """The operating system's, for what lies in one folder, while that is the one it was.

    `open` for writing and `mkdir` raise LocalError once it is not.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        """`descriptor`: the folder, opened; while it is, no other one has its number."""
        self._folder = folder
        self._held = os.fstat(descriptor)

    def open(  # type: ignore[override]  # as `Disk` has it, with less than os.open
        self, path: Path, flags: int, mode: int = 0o600
    ) -> int:
        """Open a file or folder; return its descriptor."""
        if flags & os.O_CREAT:
            self._look()
        return os.open(path, flags, mode)

    def mkdir(self, path: Path) -> None:
        """Make a folder for its owner alone, and those above it, if they are not there."""
        self._look()
        super().mkdir(path)

    def _look(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._folder), self._held):
                return
        raise LocalError(
            f"{self._folder} is not the folder any more that this device began in, and nothing is "
            "written there: was a disk unmounted, or the folder moved? bring it back, start again"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[HeldDisk]:
    """The disk to write to `folder` with, for one agent: two take each other's connection, for
    ever. The lock ends with the process. Raises LocalError for the second."""
    with disk_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"a midge-device runs in {folder} already; stop that first "
                "(sudo systemctl stop midge-device), or say another --dir"
            ) from None
        yield HeldDisk(folder, fd)
    finally:
        os.close(fd)
