"""Files that are either as they were or as they should be, whenever the power goes.

`write_atomic` promises that after it returns the bytes are on the disk under that
name, and that before it returns the name holds what it held, whole. It does not
lock: a path has one writer. What an interrupted write leaves behind (`NAME.new`) is
never read and is replaced by the next write.

Whatever the operating system refuses becomes a LocalError that names the path and
says what to do; a full disk becomes DiskFullError, because one can go on once there is room.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from broker_bridge.errors import LocalError

__all__ = ["DiskFullError", "disk_errors", "sync_folder", "write_all", "write_atomic"]


class DiskFullError(LocalError):
    """There is no room now; whatever was promised earlier is still kept."""


_ADVICE = {
    errno.EROFS: "the file system is read-only; remount it for writing, or check the card",
    errno.EACCES: "permission was refused; give this user read and write access to it",
    errno.EPERM: "permission was refused; give this user read and write access to it",
    errno.ENOENT: "there is no such file or folder; create it, or correct the path",
    errno.ENOTDIR: "a part of the path is not a folder; correct the path",
    errno.EISDIR: "this is a folder where a file was expected; correct the path",
    errno.EIO: "the disk reported an error; check it, and replace the card if this repeats",
    errno.EMFILE: "this process has too many open files; raise its limit (ulimit -n)",
}
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def _explain(error: OSError, path: Path) -> LocalError:
    if error.errno in _FULL:
        return DiskFullError(
            f"{path}: the disk is full; make room there, then this goes on by itself"
        )
    advice = _ADVICE.get(error.errno or 0, f"{error.strerror or error}; check the disk")
    return LocalError(f"{path}: {advice}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn each OSError inside the block into a LocalError that names `path`."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Make `path` hold `data`, all or nothing, and return once the disk has it.

    Raises DiskFullError or LocalError; then `path` is as it was.
    """
    fresh = path.with_name(path.name + ".new")
    with disk_errors(path):
        try:
            # O_EXCL after the unlink: a link that someone put there is never followed.
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                os.fchmod(fd, mode)  # whatever the umask says
                write_all(fd, data, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(fresh, path)
        except OSError:
            # After a failed fsync the pages may be gone though a second fsync succeeds:
            # the file is thrown away, never synced again.
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest, offset = rest[done:], offset + done


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut. Raises DiskFullError or LocalError."""
    with disk_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
