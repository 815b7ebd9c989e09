"""What a Spool promises, in two sets an upload, beside a Spool on a disk that fails and dies.

Each step is done to both, and whatever the Spool then says of itself is held against the model.
An upload that is begun anew after it was dropped has other bytes, so nothing of before can
pass for what is there now.
"""

import contextlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_bridge.errors import LocalError
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, ChunkHeader, Layout
from server.store import slots as slot_file
from server.store.spool import Spool
from tests.simulation.disk import SimulatedDisk

__all__ = ["LAYOUTS", "ModelledSpool"]

FOLDER = Path("/state/spool")
SHARED_BYTES_MAX = 12_000
# One chunk (two of one size on the disk, one larger), several chunks, and a file of its own.
LAYOUTS = (
    Layout(1_000, 1_000),
    Layout(3_000, 3_000),
    Layout(5_000, 5_000),
    Layout(2_900, 1_000),
    Layout(9_500, 4_000),
    Layout(13_000, 5_000),
)


@dataclass
class _Modelled:
    layout: Layout
    generation: int
    there: set[int] = field(default_factory=set)  # put, and not lost since
    promised: set[int] = field(default_factory=set)  # put before a sync that said yes
    tried: set[int] = field(default_factory=set)  # put or half put, at some time


class ModelledSpool:
    """A Spool, and what must be true of it."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.disk = SimulatedDisk(self._draw, self._strike)
        self.disk.mkdir(FOLDER)
        self.disk.sync_all()
        self._fails = range(0)
        self._calls = 0
        self._error = 0
        self._generation = 0
        self.uploads: dict[bytes, _Modelled] = {}
        self._ghosts: set[bytes] = set()  # that a power cut may have brought back
        self.spool = self._opened()

    # ── the disk ────────────────────────────────────────────────────────────────────────

    def fail(self, error: int, after: int, count: int) -> None:
        """Of the calls that change the disk, the next `after` work and `count` more do not."""
        self._fails, self._calls, self._error = range(after, after + count), 0, error

    def _strike(self, point: str, name: str) -> None:
        if point in ("write", "fsync", "create", "unlink"):
            self._calls += 1
            if self._calls - 1 in self._fails:
                raise OSError(self._error, f"{point} of {name}")

    @property
    def _is_well(self) -> bool:
        return self._calls >= self._fails.stop

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[list[LocalError]]:
        """Give the error that the disk is to blame for; others go through."""
        was_well, raised = self._is_well, []  # type: bool, list[LocalError]
        try:
            yield raised
        except LocalError as error:
            assert not was_well, "the disk was well"
            raised.append(error)

    # ── what is done ────────────────────────────────────────────────────────────────────

    def do(self, what: str, *how: Any) -> None:
        """One step; uploads go by their numbers. `put` begins one that is not there."""
        match what, how:
            case "restart", (power,):
                self.restart(power=power)
            case "sync", (numbers,):
                named = {b"upload-%d" % number for number in numbers}
                self.sync(sorted(named & set(self.uploads)))
            case "clear" | "fail", _:
                getattr(self, what)(*how)
            case _, (number, more):
                upload = b"upload-%d" % number
                if what in ("begin", "put"):
                    self.begin(upload, LAYOUTS[more])
                if what != "begin" and upload in self.uploads:
                    getattr(self, what)(upload, *([more] if what in ("put", "forget") else []))

    def begin(self, upload: bytes, layout: Layout) -> None:
        """As a commit does; one that is here already keeps its layout."""
        if upload in self.uploads:
            layout = self.uploads[upload].layout
        with self._may_fail() as failed:
            self.spool.begin(upload, layout)
        if not failed and upload not in self.uploads:
            self._generation += 1
            this = self.uploads[upload] = _Modelled(layout, self._generation)
            if upload in self._ghosts:
                with self._may_fail():
                    self._take_up(upload, this, power=True)

    def put(self, upload: bytes, index: int) -> None:
        """A chunk comes in."""
        this = self.uploads[upload]
        index %= this.layout.count
        header = ChunkHeader(upload, index, this.layout.count)
        with self._may_fail() as failed:
            assert self.spool.put(header, self._chunk(upload, index)) == (index not in this.there)
        this.tried.add(index)
        if not failed:
            this.there.add(index)

    def forget(self, upload: bytes, index: int) -> None:
        """A chunk did not open."""
        this = self.uploads[upload]
        with self._may_fail():
            self.spool.forget(upload, index)
        this.promised.discard(index)
        this.there.discard(index)

    def drop(self, upload: bytes) -> None:
        """An upload is not wanted any more."""
        with self._may_fail() as failed:
            self.spool.drop(upload)
        if not failed:
            del self.uploads[upload]
        else:
            self.uploads[upload].promised.clear()

    def sync(self, uploads: Collection[bytes]) -> None:
        """A group is to be promised."""
        with self._may_fail() as failed:
            self.spool.sync(uploads)
        if failed:  # what is asked for again may be more than that group
            for upload, this in self.uploads.items():
                this.there.difference_update(self.spool.missing(upload))
        else:
            for upload in uploads:
                self.uploads[upload].promised |= self.uploads[upload].there

    def read(self, upload: bytes) -> None:
        """Whatever is said to be there is what was put."""
        this = self.uploads[upload]
        found = []
        with self._may_fail() as failed:
            found = list(self.spool.chunks(upload, this.layout))
        if not failed:
            for index in this.there:
                assert found[index] == self._chunk(upload, index), (upload, index)

    def clear(self) -> None:
        """The round is over."""
        with self._may_fail() as failed:
            self.spool.clear()
        if not failed:
            self.uploads.clear()
        for upload in set(self.uploads) - self.spool.uploads():
            del self.uploads[upload]
        for this in self.uploads.values():
            this.promised.clear()

    def restart(self, *, power: bool) -> None:
        """The process dies, and with `power` the kernel too; the disk is well afterwards."""
        self._fails = range(0)
        if power:
            self.disk.power_cut()
        else:
            self.disk.kill()
        self.spool = self._opened()
        found = self.spool.uploads()
        if power:
            self._ghosts |= found - set(self.uploads)
        assert found <= self._ghosts | set(self.uploads), "one that was dropped is back"
        promised = {upload for upload, this in self.uploads.items() if this.promised}
        assert promised <= found
        for upload, this in self.uploads.items():
            self.spool.begin(upload, this.layout)
            self._take_up(upload, this, power=power)

    def _take_up(self, upload: bytes, this: _Modelled, *, power: bool) -> None:
        """Hold what is there after a restart against what was put; forget what is torn."""
        there = set(range(this.layout.count)) - set(self.spool.missing(upload))
        assert this.promised <= there, (upload, this, there)
        found = list(self.spool.chunks(upload, this.layout)) if there else []
        for index in sorted(there):
            if found[index] != self._chunk(upload, index):
                assert index not in this.promised
                assert power or index in this.tried, "it was never put"
                self.spool.forget(upload, index)
                there.discard(index)
            else:
                assert index in this.tried, "it was never put"
        if not power:
            this.tried |= there
        this.there = there

    def check(self) -> None:
        """What is asked of the Spool at any time."""
        assert self.spool.uploads() >= set(self.uploads)
        for upload, this in self.uploads.items():
            assert upload in self.spool
            missing = set(range(this.layout.count)) - this.there
            assert self.spool.missing(upload) == sorted(missing), upload
            assert self.spool.lacks(upload) == len(missing)
        slots = self.spool._slots
        assert slots._waiting_bytes == sum(map(len, slots._waiting.values()))
        assert slots._waiting_bytes <= slot_file._WAITING_BYTES_MAX
        assert set(slots._waiting) <= set(self.uploads)

    # ── what is in it ───────────────────────────────────────────────────────────────────

    def _opened(self) -> Spool:
        return Spool(
            FOLDER,
            shared_bytes_max=SHARED_BYTES_MAX,
            disk=self.disk,
            random=self._draw.randbytes,
        )

    def _chunk(self, upload: bytes, index: int) -> bytes:
        this = self.uploads[upload]
        header = ChunkHeader(upload, index, this.layout.count)
        length = this.layout.size(index) + CHUNK_OVERHEAD_BYTES
        mark = b"%s %d %d " % (upload, this.generation, index)
        return (header.encode() + mark * (length // len(mark)))[:length].ljust(length, b".")
