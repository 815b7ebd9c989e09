"""A disk in memory that can lose power, fill up and fail, and a database that dies with it.

Keeps apart what was written and what was synced. `power_cut` leaves what was synced and,
by its random source, all, some or none of the rest: writes are lost or torn in blocks, names
come or go one by one. Every call is a point at which `strike` may end the process (`Crash`)
or fail as the operating system does (OSError).
"""

import errno
import os
import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.store.database import Database

__all__ = ["Crash", "SimulatedDatabase", "SimulatedDisk"]

BLOCK_BYTES = 256
Strike = Callable[[str, str], None]  # the point, and the name of the file


class Crash(BaseException):
    """The process is gone. Not an Exception: nothing in it may catch its own end.

    `power`: whether the kernel goes with it; None: as it comes.
    """

    def __init__(self, where: str, *, power: bool | None = None) -> None:
        super().__init__(where)
        self.power = power


@dataclass
class _File:
    cache: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        """Make durable what is pending: not what a sync that failed has given up."""
        disk = bytearray(self.durable)
        for offset, data in self.pending:
            if len(disk) < offset:
                disk.extend(bytes(offset - len(disk)))
            disk[offset : offset + len(data)] = data
        self.durable, self.pending = bytes(disk), []

    def lose(self, draw: random.Random) -> None:
        """Make durable some of what is pending, and forget that the rest was ever to be."""
        disk = bytearray(self.durable)
        mode = draw.choice(("none", "all", "some", "torn"))
        for offset, data in self.pending:
            if mode == "none" or (mode == "some" and draw.random() < 0.5):
                continue
            if len(disk) < offset + len(data):
                disk.extend(bytes(offset + len(data) - len(disk)))
            for start in range(0, len(data), BLOCK_BYTES):
                if mode != "torn" or draw.random() < 0.5:
                    block = data[start : start + BLOCK_BYTES]
                    disk[offset + start : offset + start + len(block)] = block
        self.durable, self.pending = bytes(disk), []


@dataclass
class _Folder:
    names: dict[str, "_Node"] = field(default_factory=dict)
    durable: dict[str, "_Node"] = field(default_factory=dict)
    pending: list[dict[str, "_Node | None"]] = field(default_factory=list)

    def change(self, **names: "_Node | None") -> None:
        self.pending.append(names)
        _apply(self.names, names)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.names), []

    def lose(self, draw: random.Random) -> None:
        mode, upto = draw.choice(("none", "all", "first", "any")), draw.random()
        for place, names in enumerate(self.pending):
            kept = {
                "none": False,
                "all": True,
                "first": place < upto * len(self.pending),
                "any": draw.random() < 0.5,
            }
            if kept[mode]:
                _apply(self.durable, names)
        self.names, self.pending = dict(self.durable), []


_Node = _File | _Folder


def _apply(into: dict[str, _Node], names: dict[str, _Node | None]) -> None:
    for name, node in names.items():
        if node is None:
            into.pop(name, None)
        else:
            into[name] = node


class SimulatedDisk:
    """`broker_bridge.disk.Disk`, in memory. It outlives its processes."""

    def __init__(self, draw: random.Random, strike: Strike = lambda *_: None) -> None:
        self.strike = strike
        self._draw = draw
        self._root = _Folder()
        self._open: dict[int, tuple[str, _Node]] = {}
        self._next = 3

    # ── what happens to it ──────────────────────────────────────────────────────────────

    def kill(self) -> None:
        """The process is gone; the kernel keeps what it was given."""
        self._open.clear()

    def power_cut(self) -> None:
        """The kernel is gone, too."""
        self._open.clear()
        ahead: list[_Node] = [self._root]
        while ahead:
            node = ahead.pop()
            node.lose(self._draw)
            if isinstance(node, _Folder):
                ahead += node.names.values()
            else:
                node.cache = bytearray(node.durable)

    def sync_all(self) -> None:
        """Make everything durable: how a machine was before its story begins."""
        ahead: list[_Node] = [self._root]
        while ahead:
            node = ahead.pop()
            node.sync()
            ahead += node.names.values() if isinstance(node, _Folder) else ()

    def durable(self, path: Path) -> bytes | None:
        """What would be left of a file if all that is not synced were lost."""
        node: _Node | None = self._root
        for part in path.parts[1:]:
            node = node.durable.get(part) if isinstance(node, _Folder) else None
        return node.durable if isinstance(node, _File) else None

    # ── Disk ────────────────────────────────────────────────────────────────────────────

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        create = bool(flags & os.O_CREAT)
        self.strike("create" if create else "open", path.name)
        folder, node = self._find(path)
        if node is None:
            if not create:
                raise OSError(errno.ENOENT, "no such file")
            node = _File()
            folder.change(**{path.name: node})
            self.strike("created", path.name)
        elif flags & os.O_EXCL:
            raise OSError(errno.EEXIST, "there is one")
        self._next += 1
        self._open[self._next] = (path.name, node)
        return self._next

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self.strike("read", self._open[fd][0])
        return bytes(self._file(fd).cache[offset : offset + length])

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self.strike("write", self._open[fd][0])
        file, written = self._file(fd), bytes(data)
        if len(written) > 1 and self._draw.random() < 0.1:
            written = written[: len(written) // 2]  # the kernel may take less than it was given
        if len(file.cache) < offset + len(written):
            file.cache.extend(bytes(offset + len(written) - len(file.cache)))
        file.cache[offset : offset + len(written)] = written
        file.pending.append((offset, written))
        self.strike("written", self._open[fd][0])
        return len(written)

    def pwritev(self, fd: int, buffers: Sequence[bytes], offset: int) -> int:
        return self.pwrite(fd, b"".join(buffers), offset)

    def fchmod(self, fd: int, mode: int) -> None:
        self._node(fd)

    def fsync(self, fd: int) -> None:
        node = self._node(fd)
        try:
            self.strike("fsync", self._open[fd][0])
        except OSError:
            # The pages count as clean from now on: a later sync says yes and writes nothing.
            if isinstance(node, _File):
                node.lose(self._draw)
            raise
        node.sync()
        self.strike("fsynced", self._open[fd][0])

    def fdatasync(self, fds: Sequence[int]) -> list[OSError | None]:
        errors: list[OSError | None] = []
        for fd in fds:
            try:
                self.fsync(fd)
                errors.append(None)
            except OSError as error:
                errors.append(error)
        return errors

    def rename(self, old: Path, new: Path) -> None:
        self.strike("rename", new.name)
        folder, node = self._find(old)
        if node is None:
            raise OSError(errno.ENOENT, "no such file")
        assert old.parent == new.parent
        folder.change(**{old.name: None, new.name: node})
        self.strike("renamed", new.name)

    def unlink(self, path: Path) -> None:
        folder, node = self._find(path)
        if node is not None:
            self.strike("unlink", path.name)
            folder.change(**{path.name: None})
            self.strike("unlinked", path.name)

    def mkdir(self, path: Path) -> None:
        here: _Node = self._root
        for part in path.parts[1:]:
            assert isinstance(here, _Folder)
            if part not in here.names:
                self.strike("mkdir", part)
                here.change(**{part: _Folder()})
            here = here.names[part]

    def names(self, folder: Path) -> list[str]:
        self.strike("read", folder.name)
        _, node = self._find(folder)
        if not isinstance(node, _Folder):
            raise OSError(errno.ENOENT, "no such folder")
        return sorted(node.names)

    def exists(self, path: Path) -> bool:
        try:
            return self._find(path)[1] is not None
        except OSError:
            return False

    def size(self, path: Path) -> int:
        _, node = self._find(path)
        if not isinstance(node, _File):
            raise OSError(errno.ENOENT, "no such file")
        return len(node.cache)

    def read(self, path: Path) -> bytes:
        self.strike("read", path.name)
        _, node = self._find(path)
        if not isinstance(node, _File):
            raise OSError(errno.ENOENT, "no such file")
        return bytes(node.cache)

    def _find(self, path: Path) -> tuple[_Folder, _Node | None]:
        here: _Node | None = self._root
        for part in path.parts[1:-1]:
            here = here.names.get(part) if isinstance(here, _Folder) else None
        if not isinstance(here, _Folder):
            raise OSError(errno.ENOENT, "no such folder")
        return here, here.names.get(path.name)

    def _node(self, fd: int) -> _Node:
        if fd not in self._open:
            raise OSError(errno.EBADF, "not open")
        return self._open[fd][1]

    def _file(self, fd: int) -> _File:
        node = self._node(fd)
        assert isinstance(node, _File)
        return node


# ── The database ────────────────────────────────────────────────────────────────────────


class _Connection(sqlite3.Connection):
    """SQLite's own, with points before and after each commit."""

    owner: "SimulatedDatabase | None" = None

    def commit(self) -> None:
        if self.owner is None:
            super().commit()
        else:
            self.owner.commit()

    def execute(self, sql, *args):
        if self.owner is not None and sql.startswith("PRAGMA wal_checkpoint"):
            self.owner.struck("checkpoint", sqlite3.SQLITE_IOERR)
        return super().execute(sql, *args)

    def close(self) -> None:
        """It stays, as a file would."""


class _Shared:
    """One SQLite and one Database for all simulations, one after another: SQLAlchemy takes
    longer to get ready than a whole federation takes to train."""

    def __init__(self) -> None:
        self.sql = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, factory=_Connection
        )
        self.sql.execute("PRAGMA foreign_keys=ON")
        self.database = Database("midge.db", opened=lambda: self.sql)
        self.empty = self.sql.serialize()


class SimulatedDatabase:
    """Real SQLite in memory. What was committed outlives its processes; the rest does not.

    A commit that fails may be found done after a crash: the disk may have had it all
    before it said no. There is one at a time: a new one takes the place of the last.
    """

    _shared: _Shared | None = None

    def __init__(self, draw: random.Random, strike: Strike = lambda *_: None) -> None:
        shared = SimulatedDatabase._shared = SimulatedDatabase._shared or _Shared()
        self.strike = strike
        self._draw = draw
        self._ghost: bytes | None = None
        self._last = shared.empty
        self.sql, self.database = shared.sql, shared.database
        super(_Connection, self.sql).rollback()
        self.sql.deserialize(shared.empty)
        self.sql.owner = self

    def crash(self) -> None:
        """The process is gone, and its open transaction with it."""
        super(_Connection, self.sql).rollback()
        if self._ghost is not None and self._draw.random() < 0.5:
            self.sql.deserialize(self._ghost)
            self._last = self._ghost
        self._ghost = None

    def commit(self) -> None:
        if not self.sql.in_transaction:
            return
        try:
            self.struck("commit", sqlite3.SQLITE_IOERR)
        except sqlite3.Error:
            super(_Connection, self.sql).commit()
            self._ghost = self.sql.serialize()
            self.sql.deserialize(self._last)
            raise
        super(_Connection, self.sql).commit()
        self._ghost, self._last = None, self.sql.serialize()
        self.strike("committed", "midge.db")

    def struck(self, point: str, code: int) -> None:
        """Raise what SQLite raises when the disk says no."""
        try:
            self.strike(point, "midge.db")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                code = sqlite3.SQLITE_FULL
            found = sqlite3.OperationalError("disk I/O error or full")
            found.sqlite_errorcode = code
            raise found from None
