"""Files that are either as they were or as they should be, whenever the power goes.

`write_atomic` promises that after it returns the bytes are on the disk under that
name, and that before it returns the name holds what it held, whole. It does not
lock (`alone` does): a path has one writer. What an interrupted write leaves behind (`NAME.new`) is
never read and is replaced by the next write.

Whatever the operating system refuses becomes a LocalError that names the path and
says what to do; a full disk becomes DiskFullError, because one can go on once there is room.

Everything that must survive goes through a `Disk`: a dozen calls of the operating system,
so that a simulated disk can lose power between any two of them (tests/simulation).
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from broker_bridge.errors import LocalError

__all__ = [
    "REAL_DISK",
    "Disk",
    "DiskFullError",
    "RealDisk",
    "alone",
    "disk_errors",
    "erase",
    "make_folder",
    "owner_only",
    "sync_folder",
    "write_all",
    "write_atomic",
    "write_one_after_the_other",
]


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


# ── The calls ───────────────────────────────────────────────────────────────────────────


class Disk(Protocol):
    """What is asked of the operating system. Each call raises OSError."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open a file or folder; return its descriptor."""

    def close(self, fd: int) -> None:
        """Close it. Nothing is synced by that."""

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Read at most `length` bytes."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write some of `data`; return how much."""

    def pwritev(self, fd: int, buffers: Sequence[bytes], offset: int) -> int:
        """Write some of `buffers`, one after the other; return how many bytes."""

    def fchmod(self, fd: int, mode: int) -> None:
        """Set who may read and write."""

    def fsync(self, fd: int) -> None:
        """Return once the disk has a file, or the names in a folder."""

    def fdatasync(self, fds: Sequence[int]) -> list[OSError | None]:
        """Sync the contents of several files together; say of each what went wrong."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, in one step; what had that name is gone."""

    def unlink(self, path: Path) -> None:
        """Remove a name, if it is there."""

    def mkdir(self, path: Path) -> None:
        """Make a folder for its owner alone, and those above it, if they are not there."""

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, sorted."""

    def exists(self, path: Path) -> bool:
        """Whether there is a file or folder of this name."""

    def size(self, path: Path) -> int:
        """How many bytes a file has."""

    def read(self, path: Path) -> bytes:
        """All that is in a file."""


class RealDisk:
    """The operating system's."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)
    pwritev = staticmethod(os.pwritev)
    fchmod = staticmethod(os.fchmod)
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.rename)
    exists = staticmethod(os.path.exists)
    size = staticmethod(os.path.getsize)

    def fdatasync(self, fds: Sequence[int]) -> list[OSError | None]:
        """Sync the contents of several files together; say of each what went wrong."""
        # All at once: the file system then puts them into one commit of its journal, where
        # one after the other would wait for one commit each. The pool is gone with the block.
        if len(fds) < 2:
            return [_fdatasync(fd) for fd in fds]
        with ThreadPoolExecutor(len(fds)) as pool:
            return list(pool.map(_fdatasync, fds))

    def unlink(self, path: Path) -> None:
        """Remove a name, if it is there."""
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        """Make a folder for its owner alone, and those above it, if they are not there."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def names(self, folder: Path) -> list[str]:
        """The names in a folder, sorted."""
        return sorted(os.listdir(folder))

    def read(self, path: Path) -> bytes:
        """All that is in a file."""
        return path.read_bytes()


REAL_DISK = RealDisk()


def _fdatasync(fd: int) -> OSError | None:
    # On a handle that was opened again since the write, the kernel reports a failed
    # write-back all the same (Linux ≥ 4.16).
    try:
        os.fdatasync(fd)
    except OSError as error:
        return error
    return None


# ── What is made of them ────────────────────────────────────────────────────────────────


def _explain(error: OSError, path: Path) -> LocalError:
    if error.errno in _FULL:
        return DiskFullError(
            f"{path}: the disk is full; make room there, then this goes on by itself"
        )
    advice = _ADVICE.get(error.errno or 0, f"{error.strerror or error}; check the disk")
    return LocalError(f"{path}: {advice}")


class _DiskErrors:
    """A class, for one is entered for every chunk: a generator takes three times as long."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise _explain(error, self._path) from error


def disk_errors(path: Path) -> _DiskErrors:
    """Turn each OSError inside the block into a LocalError that names `path`."""
    return _DiskErrors(path)


def write_atomic(
    path: Path,
    data: bytes,
    mode: int = 0o600,
    *,
    disk: Disk = REAL_DISK,
    durable: bool = True,
) -> None:
    """Make `path` hold `data`, all or nothing, and return once the disk has it.

    Not `durable`: return at once; a power cut may take the file away, old and new.
    Raises DiskFullError or LocalError; then `path` is as it was.
    """
    fresh = path.with_name(path.name + ".new")
    with disk_errors(path):
        try:
            # O_EXCL after the unlink: a link that someone put there is never followed.
            disk.unlink(fresh)
            fd = disk.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                disk.fchmod(fd, mode)  # whatever the umask says
                write_all(fd, data, 0, disk=disk)
                if durable:
                    disk.fsync(fd)
            finally:
                disk.close(fd)
            disk.rename(fresh, path)
        except OSError:
            # After a failed fsync the pages may be gone though a second fsync succeeds:
            # the file is thrown away, never synced again.
            with contextlib.suppress(OSError):
                disk.unlink(fresh)
            raise
    if durable:
        sync_folder(path.parent, disk=disk)


def owner_only(path: str, flags: int) -> int:
    """For `open(…, opener=owner_only)`: a file that is made is its owner's, whatever the umask.

    For logs and locks, which need not survive.
    """
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def alone(path: Path, *, refusal: str = "") -> Iterator[None]:
    """Hold the lock file `path`, which one process can at a time.

    Waits until it is free; with a `refusal`, raises LocalError of that instead. The lock ends
    with the process, however that ends.
    """
    with disk_errors(path), open(path, "w", opener=owner_only) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise LocalError(refusal) from None
        yield


def write_all(fd: int, data: bytes, offset: int, *, disk: Disk = REAL_DISK) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    done = disk.pwrite(fd, data, offset)
    while done < len(data):
        done += disk.pwrite(fd, memoryview(data)[done:], offset + done)


def write_one_after_the_other(
    fd: int, buffers: Sequence[bytes], offset: int, *, disk: Disk = REAL_DISK
) -> None:
    """Write all of `buffers`, which are few enough for one call (1024), from `offset` on.

    Raises OSError.
    """
    if not buffers:
        return
    done = disk.pwritev(fd, buffers, offset)
    if done < sum(map(len, buffers)):
        write_all(fd, b"".join(buffers)[done:], offset + done, disk=disk)


def make_folder(folder: Path, *, disk: Disk = REAL_DISK) -> None:
    """Make `folder`, if it is not there, and its name durable.

    Raises DiskFullError or LocalError.
    """
    with disk_errors(folder):
        disk.mkdir(folder)
    sync_folder(folder.parent, disk=disk)


def erase(path: Path, *, disk: Disk = REAL_DISK) -> None:
    """Overwrite a file and remove it. Flash memory may keep old blocks all the same.

    Raises LocalError, also for a link.
    """
    with disk_errors(path):
        fd = disk.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            write_all(fd, bytes(disk.size(path)), 0, disk=disk)
            disk.fsync(fd)
        finally:
            disk.close(fd)
        disk.unlink(path)
    sync_folder(path.parent, disk=disk)


def sync_folder(folder: Path, *, disk: Disk = REAL_DISK) -> None:
    """Make the names in `folder` survive a power cut. Raises DiskFullError or LocalError."""
    with disk_errors(folder):
        fd = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            disk.fsync(fd)
        finally:
            disk.close(fd)
