"""The server's database: devices, runs, rounds, receipts, models. SQLAlchemy Core only.

`transaction` promises all or nothing, and that when its block has ended the disk has it;
put many changes into one block and they share one fsync. A kill at any instruction leaves
the last commit. SQLite is the default (WAL, synchronous=FULL: a commit survives a power
cut); a SQLAlchemy URL names another database, which is then trusted to be as durable.

One server process writes. Others may read at the same time (`reading`).
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.pool import QueuePool

from broker_bridge.disk import DiskFullError, disk_errors, sync_folder
from broker_bridge.errors import LocalError
from server.store import schema
from server.store.transaction import Transaction

__all__ = ["AtDisk", "Database"]

AtDisk = Callable[[], contextlib.AbstractContextManager[None]]

# secure_delete: the bytes of a round key are overwritten when the key is removed.
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "secure_delete=ON",
)

_ADVICE = {
    sqlite3.SQLITE_BUSY: "another process holds it; stop that one, or wait",
    sqlite3.SQLITE_READONLY: "it cannot be written; give this user write access to file and folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the path and who may read it",
    sqlite3.SQLITE_IOERR: "the disk reported an error; check it, then start again",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restore it from a backup",
    sqlite3.SQLITE_NOTADB: "this is not a midge database; correct the path, or move the file away",
}


class Database:
    """A database file (a path) or a database server (a URL with `://`)."""

    def __init__(
        self,
        url_or_path: str | Path,
        *,
        busy_timeout_s: float = 10.0,
        opened: Callable[[], sqlite3.Connection] | None = None,
    ) -> None:
        """Open it, and make it if there is none. Raises LocalError.

        `busy_timeout_s`: how long to wait for another process that is writing.
        `opened`: how else than by its path SQLite's file is opened, always in autocommit mode.
        """
        if opened is None:
            self.where, self._engine = _connect(str(url_or_path), busy_timeout_s)
        else:
            self.where, self._engine = str(url_or_path), _sqlite(opened)
        try:
            with self.transaction() as tx:
                self._prepare(tx)
        except BaseException:
            self.close()
            raise

    def _prepare(self, tx: Transaction) -> None:
        connection = tx._sql
        if not inspect(connection).has_table(schema.meta.name):
            schema.METADATA.create_all(connection)
            tx.set_meta("schema", str(schema.VERSION))
        found = int(tx.meta("schema") or 0)
        if found > schema.VERSION:
            raise LocalError(
                f"{self.where}: written by a newer midge (schema {found}, this one knows "
                f"{schema.VERSION}); upgrade midge, or use another folder"
            )

    @contextlib.contextmanager
    def transaction(self, *, at_disk: AtDisk = contextlib.nullcontext) -> Iterator[Transaction]:
        """Change things: all of the block, durably, or, when it raises, nothing.

        `at_disk` is entered while the disk is waited for.
        Raises DiskFullError when there is no room (nothing is lost: try again later) and
        LocalError when the database cannot be used.
        """
        with self._errors(), self._engine.connect() as connection:
            connection.begin()
            try:
                yield Transaction(connection)
                with at_disk():
                    connection.commit()
            except BaseException:
                connection.rollback()  # also after a commit that failed: it may be open still
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[Transaction]:
        """Look at things as they are at one moment, without holding up a writer."""
        with self._errors(), self._engine.connect() as connection:
            yield Transaction(connection.execution_options(midge_reads=True))

    def checkpoint(self) -> None:
        """Fold SQLite's log into its file and empty it, so that removed keys are gone there too.

        Flash memory may keep old blocks where no file system can reach them: docs/threats.md.
        """
        if self._engine.dialect.name == "sqlite":
            with self._errors(), self._engine.connect() as connection:
                driver = connection.connection.driver_connection
                if driver is not None:
                    driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def copy_to(self, path: Path) -> None:
        """Write all of it, as it is at this moment, into a new file at `path` (SQLite only).

        Nothing that was removed is in the copy. A server may be at work meanwhile.
        """
        with disk_errors(path):  # made before SQLite makes it: nobody else may ever read it
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with self._errors(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            if driver is not None:
                driver.execute("VACUUM INTO ?", (str(path),))

    def close(self) -> None:
        """Close every connection. What was committed stays."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the database could not do into a LocalError; our own bugs stay as they are."""
        try:
            yield
        except sqlite3.Error as error:  # the driver's own, where it is asked without SQLAlchemy
            raise _explain(self.where, error) from error
        except DatabaseError as error:
            if not (isinstance(error, OperationalError) or type(error) is DatabaseError):
                raise
            raise _explain(self.where, error.orig) from error


def _explain(where: str, error: BaseException | None) -> LocalError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind
    if code == sqlite3.SQLITE_FULL:
        return DiskFullError(
            f"{where}: the disk is full; make room there, then this goes on by itself"
        )
    return LocalError(f"{where}: {_ADVICE.get(code, f'the database said: {error}')}")


def _connect(text: str, busy_timeout_s: float) -> tuple[str, Engine]:
    """What to call the database in sentences, and the way to it."""
    if "://" not in text:
        return text, _connect_file(Path(text), busy_timeout_s)
    try:
        url = make_url(text)
        if url.get_backend_name() == "sqlite":  # the same file, with the same promises
            path = url.database or ""
            return path, _connect_file(Path(path), busy_timeout_s)
        # hide_parameters: errors are logged, and parameters hold keys.
        return url.render_as_string(hide_password=True), create_engine(url, hide_parameters=True)
    except (ArgumentError, ImportError) as error:
        raise LocalError(f"the database URL cannot be used: {error}") from None


def _connect_file(path: Path, busy_timeout_s: float) -> Engine:
    with disk_errors(path):
        # Made before SQLite makes it, so that nobody else can ever read it; the files that
        # SQLite puts beside it get the same mode. A file that is there keeps its mode: it
        # may be somebody else's.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sync_folder(path.absolute().parent)
    return _sqlite(lambda: _open_sqlite(path, busy_timeout_s))


def _sqlite(opened: Callable[[], sqlite3.Connection]) -> Engine:
    engine = create_engine("sqlite://", creator=opened, poolclass=QueuePool, hide_parameters=True)
    event.listen(engine, "begin", _begin)
    return engine


def _open_sqlite(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    # isolation_level=None: the driver starts no transactions of its own; `_begin` does.
    connection = sqlite3.connect(
        path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
    )
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _begin(connection: Connection) -> None:
    """Writers queue up at once, not half-way, where SQLite could only refuse one of them."""
    driver = connection.connection.driver_connection
    if driver is not None:
        reads = connection.get_execution_options().get("midge_reads")
        driver.execute("BEGIN" if reads else "BEGIN IMMEDIATE")
