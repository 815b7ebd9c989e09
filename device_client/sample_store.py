"""A bounded, crash-safe store of labelled samples, for a sensor that never stops.

A sensor's callback appends windows; training reads them a batch at a time, while more are
appended. Oldest samples go when there are too many bytes of them, or when they are too
old. A power cut loses the last few samples at most, and never the store.

    store = SampleStore(path, shapes=[(50, 6)], bytes_max=200_000_000, age_max_s=30 * 86_400)
    store.append([window], label=3)          # from any thread

    midge-device run --data store:samples.db

Samples are stored as the sensor gave them; a task's standardisation is applied when they
are read, so that the next task may standardise otherwise.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.disk import disk_errors, owner_only
from broker_bridge.errors import LocalError
from broker_bridge.task.samples import Samples, check_samples, standardise
from broker_bridge.task.taskfile import Task

__all__ = ["SampleStore", "read_store"]

Array = NDArray[Any]

_FORMAT = 1
_BLOCK_ROWS = 256  # that are held at once while a store is checked
_EXPIRED_MAX = 2  # samples that one append may expire: a clock that jumps empties no store
_SCHEMA = """
create table about (format integer, shapes text);
create table samples (id integer primary key autoincrement, at real, label real, inputs blob);
create index by_age on samples (at);
"""


class SampleStore:
    """The writing end. One process writes; any number may read."""

    def __init__(
        self,
        path: Path,
        *,
        shapes: Sequence[Sequence[int]],
        bytes_max: int = 200_000_000,
        age_max_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store at `path`, or make it. `shapes` are those of one sample's inputs.

        `bytes_max` bounds the samples; the file is a little larger. Raises LocalError when the
        file is none of ours, was made for other shapes, or cannot be written.
        """
        self._path = path
        self._shapes = tuple(tuple(int(n) for n in shape) for shape in shapes)
        row_bytes = 4 * sum(int(np.prod(shape)) for shape in self._shapes)
        self._rows_max = bytes_max // max(row_bytes, 1)
        if self._rows_max < 1:
            raise LocalError(
                f"{bytes_max} bytes hold no sample of {row_bytes} bytes; allow the store more"
            )
        self._age_max_s = age_max_s
        self._clock = clock
        self._lock = threading.Lock()
        with disk_errors(path), open(path, "ab", opener=owner_only):
            pass  # samples are their owner's alone, and SQLite's files beside it are as this one
        with _sqlite_errors(path):
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            # The journal is synced at checkpoints, not at each commit: what a power cut loses is
            # the newest samples, never the file. https://www.sqlite.org/wal.html
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = normal")
            self._make_or_check()

    def append(self, inputs: Sequence[Array], label: float) -> None:
        """Add one sample: an array for each input, and its label.

        Raises LocalError for what is not of the store's shapes or not finite, and for a disk
        that is full; the store is then as it was.
        """
        blob = self._encoded(inputs)
        if not np.isfinite(label):
            raise LocalError(f"the label {label} is not a finite number; drop the sample")
        now_s = self._clock()
        with self._lock, _sqlite_errors(self._path), _transaction(self._db):
            added = self._db.execute(
                "insert into samples (at, label, inputs) values (?, ?, ?)",
                (now_s, float(label), blob),
            )
            newest = added.lastrowid or 0
            self._db.execute("delete from samples where id <= ?", (newest - self._rows_max,))
            if self._age_max_s is not None:
                self._db.execute(
                    "delete from samples where id in "
                    "(select id from samples where at < ? and id < ? order by at limit ?)",
                    (now_s - self._age_max_s, newest, _EXPIRED_MAX),
                )

    def __len__(self) -> int:
        with self._lock, _sqlite_errors(self._path):
            (count,) = self._db.execute("select count(*) from samples").fetchone()
        return int(count)

    def close(self) -> None:
        """Write out what is in the journal, and let go of the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_or_check(self) -> None:
        with _transaction(self._db):
            tables = self._db.execute("select count(*) from sqlite_master").fetchone()[0]
            if not tables:
                for statement in _SCHEMA.strip().split(";\n"):
                    self._db.execute(statement)
                shapes = msgspec.json.encode(self._shapes).decode()
                self._db.execute("insert into about values (?, ?)", (_FORMAT, shapes))
        found = _shapes_in(self._db, self._path)
        if found != self._shapes:
            raise LocalError(
                f"{self._path} holds samples of shapes {list(map(list, found))}, not "
                f"{list(map(list, self._shapes))}; use another file for another sensor"
            )

    def _encoded(self, inputs: Sequence[Array]) -> bytes:
        if len(inputs) != len(self._shapes):
            raise LocalError(
                f"a sample here has {len(self._shapes)} input(s), and {len(inputs)} were given"
            )
        parts = []
        for array, shape in zip(inputs, self._shapes, strict=True):
            values = np.asarray(array, "<f4")
            if values.shape != shape:
                raise LocalError(
                    f"a sample of shape {list(values.shape)} was given; the store holds "
                    f"{list(shape)}"
                )
            if not np.isfinite(values).all():
                raise LocalError("a sample holds NaN or infinity; drop it, or repair the sensor")
            parts.append(values.tobytes())
        return b"".join(parts)


class _StoredRows:
    """One input of every sample, read when it is asked for: `rows[[3, 1, 7]]`."""

    def __init__(self, reader: "_Reader", number: int) -> None:
        self._reader = reader
        self._number = number
        self.dtype = np.dtype(np.float32)
        self.shape = (len(reader.ids), *reader.shapes[number])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        return self._reader.read(rows)[self._number]


class _Reader:
    """What was in the store at one moment; a transaction keeps it there while we read."""

    def __init__(self, path: Path, task: Task) -> None:
        self._path = path
        self._task = task
        self._kept: tuple[bytes, tuple[Array, ...]] | None = None  # the rows read last
        with _sqlite_errors(path):
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False,
                isolation_level=None,
            )  # fmt: skip
            self.shapes = _shapes_in(self._db, path)
            self._db.execute("begin")
            found = self._db.execute("select id, label from samples order by id").fetchall()
        self.ids = np.array([row[0] for row in found], np.int64)
        self.labels = np.array([row[1] for row in found], np.float64)

    def read(self, rows: Any) -> tuple[Array, ...]:
        """Every input of these rows, standardised as the task says."""
        ids = np.atleast_1d(self.ids[rows])
        key = ids.tobytes()
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._decoded(ids)
        return self._kept[1]

    def _decoded(self, ids: NDArray[np.int64]) -> tuple[Array, ...]:
        marks = ",".join("?" * len(ids))
        with _sqlite_errors(self._path):
            found = dict(
                self._db.execute(
                    f"select id, inputs from samples where id in ({marks})",  # noqa: S608
                    ids.tolist(),
                ).fetchall()
            )
        try:
            values = np.stack([np.frombuffer(found[i], "<f4") for i in ids.tolist()])
            sizes = [int(np.prod(shape)) for shape in self.shapes]
            parts = np.split(values, np.cumsum(sizes)[:-1], axis=1)
            inputs = tuple(
                part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)
            )
        except (KeyError, ValueError):
            raise _damaged(self._path) from None
        return tuple(standardise(self._task, each) for each in inputs)


def read_store(path: Path, task: Task) -> Samples:
    """The samples in a store, checked for `task`; inputs are read from the file as needed.

    Labels are in memory, and at most 256 samples at a time. What is appended later is not
    among them. Raises LocalError naming the file.
    """
    if not path.is_file():
        raise LocalError(f"there is no sample store {path}; correct the path, or let it record")
    reader = _Reader(path, task)
    inputs = tuple(_StoredRows(reader, number) for number in range(len(reader.shapes)))
    if not len(reader.ids):
        raise LocalError(f"{path} holds no samples yet; let the sensor record some")
    labels = [_checked(task, inputs, reader.labels, each) for each in _blocks(len(reader.ids))]
    return Samples(
        inputs,  # type: ignore[arg-type]
        np.concatenate(labels),
        checked_for=task,
        descriptors=_descriptors(path),
    )


def _checked(
    task: Task, inputs: Sequence[_StoredRows], labels: Array, block: slice
) -> NDArray[Any]:
    """The labels of a block of samples that fit the task; its inputs are let go again."""
    samples = Samples(tuple(rows[block] for rows in inputs), labels[block])
    return check_samples(task, samples).labels


def _descriptors(path: Path) -> tuple[int, ...]:
    """What SQLite has open of this store: the file, its journal, and the journal's index."""
    found = []
    with contextlib.suppress(OSError):
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the folder's own, gone by now
                if str(each.readlink()).startswith(str(path.resolve())):
                    found.append(int(each.name))
    return tuple(found)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, count))


def _shapes_in(db: sqlite3.Connection, path: Path) -> tuple[tuple[int, ...], ...]:
    try:
        version, shapes = db.execute("select format, shapes from about").fetchone()
        if version != _FORMAT:
            raise LocalError(f"{path} was written by a newer midge; update this device")
        return msgspec.json.decode(shapes, type=tuple[tuple[int, ...], ...])
    except (sqlite3.DatabaseError, TypeError, ValueError, msgspec.MsgspecError):
        raise _damaged(path) from None


def _damaged(path: Path) -> LocalError:
    return LocalError(
        f"{path} is not a sample store, or is damaged; move it away, and a new one is made"
    )


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("begin immediate")
    try:
        yield
    except BaseException:
        db.execute("rollback")
        raise
    db.execute("commit")


@contextlib.contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says into one sentence."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise LocalError(f"{path}: {error}; is the disk full, or the folder not ours?") from None
    except sqlite3.DatabaseError:
        raise _damaged(path) from None
