"""The fleet's keys, settings, tasks, database and models in one sealed file, and back.

What a backup holds is listed in `_FILES`. The root key is not in it: it belongs in a drawer.
Nor is what must be gone when a round ends: the copy of the database has no open round and no
round key, and the sealed updates of the spool are left out. So is `state/highest-round`: it would
be older than the rounds that it should tell of, and a restored server numbers above all of them.

A restored server knows less than its devices. Whatever they compare with what they saw is
therefore numbered above anything that can have been lost: rounds and models from the time of
the restore on, in milliseconds since 1970 (decision 0080), and the fleet key is a new one.
"""

import contextlib
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import msgspec

from broker_bridge.disk import (
    REAL_DISK,
    alone,
    disk_errors,
    make_folder,
    sync_folder,
    write_atomic,
)
from broker_bridge.errors import LocalError
from broker_bridge.wire.envelope import random_bytes
from server.fleet.finding import check_place
from server.fleet.home import Home
from server.fleet.sealed_file import Cost, Reader, Writer
from server.old_copy import abandon_open, floor_above
from server.store.database import Database

__all__ = ["Contents", "Restored", "back_up", "left_out", "remove_leftovers", "restore"]

# The whole of these folders, and of broker/ and state/ what cannot be made again.
_FILES = re.compile(
    r"(keys|ca|server|operator|tasks|logins)/[^/]+"
    r"|broker/[^/]+\.(pem|acl)"
    r"|state/models/\d+\.(weights|optimiser)"
)
_NEVER = re.compile(r".*(\.new|lock)")
_FOLDERS = (
    "keys", "ca", "broker", "server", "operator", "bundles", "tasks", "logins", "state",
    "state/models",
)  # fmt: skip
_DATABASE = "state/midge.db"
_COPY = "backup"  # below state/, while a backup is made
_SETTINGS = "midge.toml"
_CONTENTS = "backup.json"


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a backup says of itself."""

    midge_backup: int = 1
    federation: str
    made_at: float  # seconds since 1970
    round: int  # the highest that was ever opened
    model: int  # the newest version
    devices: int


@dataclass(frozen=True)
class Restored:
    """A fleet as it came out of a backup."""

    home: Home
    contents: Contents
    above: int  # the next round has a higher number
    tokens_void: int  # rights to enrol that had not been used


# ── Into the file ───────────────────────────────────────────────────────────────────────


def back_up(
    home: Home, path: Path, passphrase: str, *, now: float, cost: Cost | None = None
) -> Contents:
    """Write a sealed backup of the fleet to the new file `path`. A server may be at work.

    Raises LocalError; then there is no such file.
    """
    if path.exists():
        raise LocalError(f"{path} is there already; choose another name, nothing was changed")
    with disk_errors(home.state), _scratch(home) as copy, _whole(path) as out:
        sealed = Writer(out, passphrase, cost=cost or Cost())  # takes a while
        contents = _copied(home, copy, now)
        with tarfile.open(mode="w|", fileobj=cast(BinaryIO, sealed)) as tar:
            _add(tar, _CONTENTS, msgspec.json.encode(contents))
            for name, file in _found(home, copy):
                _add_file(tar, name, file)
        sealed.finish()
    return contents


@contextlib.contextmanager
def _scratch(home: Home) -> Iterator[Path]:
    """Where the copy of the database lies meanwhile. One backup at a time; another one waits."""
    with alone(_lock(home)):
        _remove_copy(home)
        make_folder(home.state / _COPY)
        try:
            yield home.state / _COPY / "midge.db"
        finally:
            _remove_copy(home)


def remove_leftovers(home: Home) -> None:
    """Remove what a backup that was killed left behind, unless one is being made now.

    It is a copy of the database: with it the key of a round would outlive that round.
    """
    if (home.state / _COPY).exists():
        with contextlib.suppress(LocalError), alone(_lock(home), refusal="one is being made"):
            _remove_copy(home)


def _remove_copy(home: Home) -> None:
    with disk_errors(home.state / _COPY), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(home.state / _COPY)


def _lock(home: Home) -> Path:
    return home.folder / "keys" / "backup.lock"


def _copied(home: Home, copy: Path, now: float) -> Contents:
    """Copy the database, without the round that is open; say what is in it."""
    with contextlib.closing(Database(home.database)) as db:
        db.copy_to(copy)
    federation = home.keys().federation
    with contextlib.closing(Database(copy)) as db:
        with db.transaction() as tx:
            abandon_open(tx, federation, now_s=now, reason="it was open when the backup was made")
            contents = Contents(
                federation=federation,
                made_at=now,
                round=tx.highest_round(),
                model=max(0, tx.highest_model()),
                devices=sum(tx.device_counts().values()),
            )
        db.checkpoint()
    return contents


def _found(home: Home, database: Path) -> Iterator[tuple[str, Path]]:
    """What goes in, in the order in which it is restored: the settings make it a fleet."""
    # Models first: a server at work removes old ones, and the database was copied just now.
    models, others = home.state / "models", home.folder.rglob("*")
    kept = sorted(models.iterdir()) if models.exists() else []  # none before the first start
    for file in [*kept, *sorted(f for f in others if f.parent != models)]:
        name = file.relative_to(home.folder).as_posix()
        if _FILES.fullmatch(name) and not _NEVER.fullmatch(name) and file.is_file():
            yield name, file
    yield _DATABASE, database
    yield _SETTINGS, home.folder / _SETTINGS


def _add_file(tar: tarfile.TarFile, name: str, file: Path) -> None:
    try:
        with disk_errors(file):
            data = file.read_bytes()
    except LocalError:
        if name.startswith("state/models/") and not file.exists():
            return  # the server needs it no more, and removed it just now
        raise
    _add(tar, name, data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that is there whole, on the disk, or not at all."""
    fresh = path.with_name(path.name + ".new")
    with disk_errors(path):
        REAL_DISK.unlink(fresh)
        fd = REAL_DISK.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as out:
                yield out
                out.flush()
                REAL_DISK.fsync(fd)
            REAL_DISK.rename(fresh, path)
        except BaseException:
            REAL_DISK.unlink(fresh)
            raise
    sync_folder(path.absolute().parent)


def left_out(home: Home) -> list[Path]:
    """The files that midge.toml names for its broker and that lie where no backup looks."""
    named = home.login_files(secret=True) | home.login_files(secret=False)
    here = home.folder.absolute()
    return sorted(
        path for path in named
        if not (path.is_relative_to(here) and _FILES.fullmatch(path.relative_to(here).as_posix()))
    )  # fmt: skip


# ── And back ────────────────────────────────────────────────────────────────────────────


def restore(path: Path, folder: Path, passphrase: str, *, now: float, above: int = 0) -> Restored:
    """Make the fleet of the backup `path` in `folder`, which must be new or empty.

    `above`: a round number that devices have seen, for a machine whose clock is wrong.
    Raises LocalError; then the folder is as empty as it was.
    """
    check_place(folder)
    with disk_errors(path), path.open("rb") as file:
        reader = Reader(file, passphrase, name=str(path))
        try:
            _make_folders(folder)
            contents, settings = _unpacked(reader, folder)
            reader.finish()
            made = _settled(Home(folder), contents, now=now, above=above)
            # Last: a folder without it is not a fleet, so an interrupted restore can be seen.
            write_atomic(folder / _SETTINGS, settings, mode=0o644)
        except BaseException:
            for left in list(folder.iterdir()) if folder.exists() else []:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            raise
    return made


def _make_folders(folder: Path) -> None:
    make_folder(folder)
    for name in _FOLDERS:
        make_folder(folder / name)


def _unpacked(reader: Reader, folder: Path) -> tuple[Contents, bytes]:
    """Write every file but the settings; return them and what the backup says of itself."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(mode="r|", fileobj=cast(BinaryIO, reader)) as tar:
            for member in tar:
                _unpack(tar, member, folder, found)
        return msgspec.json.decode(found[_CONTENTS], type=Contents), found[_SETTINGS]
    except (KeyError, ValueError, RecursionError, msgspec.MsgspecError, tarfile.TarError):
        raise LocalError("this backup was made by another midge; install that version") from None


def _unpack(
    tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, found: dict[str, bytes]
) -> None:
    """Write one file; keep the settings, and what the backup says of itself, in `found`."""
    data = _read(tar, member)
    if member.name in (_CONTENTS, _SETTINGS):
        found[member.name] = data
    elif member.name == _DATABASE or _FILES.fullmatch(member.name):
        write_atomic(folder / PurePosixPath(member.name), data)
    else:
        raise LocalError(f"the backup holds {member.name!r}, which this midge does not know")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isreg() else None
    if file is None or ".." in member.name.split("/"):
        raise LocalError(f"the backup holds {member.name!r}, which is no file")
    return file.read()


def _settled(home: Home, contents: Contents, *, now: float, above: int) -> Restored:
    """Put what devices compare above everything that can have been lost."""
    floor = max(above, floor_above(max(contents.round, contents.model), now_s=now))
    home.change_keys(lambda keys: keys.restored(random_bytes, now=now))
    with contextlib.closing(Database(home.database)) as db, db.transaction() as tx:
        tx.set_floor(floor)
        void = tx.void_tokens(now)  # one of them may have been used since
    return Restored(home, contents, floor, void)
