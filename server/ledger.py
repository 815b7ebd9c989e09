"""What a run writes down: runs, rounds and models. No network.

The order of writing is the promise. An update is accepted when its chunks and its
receipt are on the disk (see intake.py). A model is a file before its row exists
(lineage.py), and its row, the end of its round and the run's progress are one
transaction. So after a kill at any instruction `restore` finds a run that goes on:
the sum is made again from the updates that have a receipt, to the same bits.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from broker_bridge.disk import REAL_DISK, Disk, DiskFullError
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.wire import messages, weights
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, Layout
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, random_bytes, sha256
from broker_bridge.wire.messages import Announcement, Init, RoundSummary, Until
from server.announcer import Announcer
from server.config import ServerConfig
from server.events import Accept, Accepted, Opened, OpenRound, Refused, Run, Upload
from server.fleet.home import Home, ServerKeys
from server.intake import Intake
from server.lineage import Lineage, LoadedTask, TaskFiles, Weights
from server.old_copy import settle_old_copy
from server.recall import Recalled, recall
from server.store import rows
from server.store.database import AtDisk, Database
from server.store.highest import HighestRound
from server.store.models import ModelFiles
from server.store.spool import Spool

__all__ = ["Ledger", "Restored"]

log = logging.getLogger("midge.server")

_MB = 1_000_000
_SHARED_BYTES_MAX = 256 * 1024  # updates up to this share a file: one sync for many


@dataclass(frozen=True)
class Restored:
    """A run that was open when the server died."""

    run: Run
    opened: Opened | None
    signed: bytes  # the open round's announcement, by the server's present key
    uploads: list[Upload]
    elapsed_s: float
    paused: bool
    last: RoundSummary | None = None  # of the run's newest round, if that one made a model


class Ledger:
    """The memory of one federation's server. One thread uses it."""

    intake: ClassVar[type[Intake]] = Intake  # how a round's updates are taken in

    def __init__(
        self,
        home: Home,
        config: ServerConfig,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = random_bytes,
        disk: Disk = REAL_DISK,
        db: Database | None = None,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self.db = db or Database(home.database)
        self.keys: ServerKeys = home.keys()
        self._home = home
        self._config = config
        self._clock = clock  # seconds since 1970: for people, and for deadlines after a restart
        self._random = random
        self._disk = disk
        self._free_bytes = free_bytes  # of the disk that a path is on; None: nobody knows
        self._tasks = TaskFiles(home.folder / "tasks", config.tasks, disk=disk)
        self._models = ModelFiles(home.state / "models", disk=disk)
        self._highest = HighestRound(home.state / "highest-round", disk=disk)
        self._written: rows.Round | None = None  # down, and for want of room not announced
        self._line = Lineage(self._models, config, clock=clock)
        self.announcer = Announcer(self.keys, config, self._line, clock=clock, random=random)
        self._spool = Spool(
            home.state / "spool", shared_bytes_max=_SHARED_BYTES_MAX, disk=disk, random=random
        )
        self._open: Intake | None = None
        self._fleet_key: bytes | None = None  # under which the open round's blobs are sealed
        self._untidy = False  # whether a full disk kept what a round left behind

    @property
    def task(self) -> LoadedTask | None:
        """The task that is trained, or was last."""
        return self._line.task

    @property
    def model(self) -> Weights:
        """The present model."""
        return self._line.model

    @property
    def model_bytes(self) -> bytes:
        """The present model, encoded."""
        return self._line.data

    @property
    def model_version(self) -> int:
        """The present model's version; 0: none."""
        return self._line.version

    # ── keys ────────────────────────────────────────────────────────────────────────────

    @property
    def fleet_key(self) -> bytes:
        """What task and model are sealed under: an open round keeps the key it began with."""
        return self._fleet_key or self.keys.fleet_key

    def take_keys(self, keys: ServerKeys) -> None:
        """Go on with keys that a command changed."""
        self.keys = self.announcer.keys = keys

    def has_upload_of(self, device: str) -> bool:
        """Whether an update of the open round was sealed by this device's present keys."""
        return self._open is not None and self._open.has_upload_of(device)

    # ── runs ────────────────────────────────────────────────────────────────────────────

    def start(self, run: Run) -> Run:
        """Load the task, find or make its first model, write the run down.

        Raises LocalError with a sentence for the operator.
        """
        path = self._tasks.named(run.task)
        task = self._tasks.load(path)
        # By the file's name, as the operator named it: `restore` looks for the file again.
        name = path.stem
        with self.db.transaction() as tx:
            model = tx.latest_model(task.plan.digest)
            if model is None:
                model = self._line.first(task, tx.highest_model() + 1)
                tx.add_model(model)
            self._line.use(task, model)  # first: a run whose model cannot be read must not begin
            self.announcer.check_size()
            run_id = tx.add_run(
                rows.Run(
                    task_name=name,
                    task_digest=task.plan.digest,
                    rounds_total=run.rounds,
                    until_json=_json(run.until),
                    target=run.target,
                    quorum=run.quorum,
                    deadline_s=run.deadline_s,
                    started_at=self._clock(),
                )
            )
        return Run(
            id=run_id,
            task=name,
            rounds=run.rounds,
            until=run.until,
            target=run.target,
            quorum=run.quorum,
            deadline_s=run.deadline_s,
        )

    def mark_paused(self, run_id: int, paused: bool) -> None:
        """Write down that a run is paused, or goes on."""
        with self.db.transaction() as tx:
            tx.set_run_status(run_id, "paused" if paused else "open")

    def end_run(self, run_id: int, status: rows.RunStatus, reason: str) -> None:
        """Write down that a run is over."""
        with self.db.transaction() as tx:
            tx.set_run_status(run_id, status, reason=reason, ended_at=self._clock())

    # ── a round ─────────────────────────────────────────────────────────────────────────

    def open_round(self, effect: OpenRound) -> tuple[Opened, bytes]:
        """Make a round and write it down; return it and its signed announcement.

        Raises DiskFullError; then it is tried again, and goes on with the round it wrote down.
        """
        this = self._written = self._written or self._write_down(effect)
        self._highest.note(this.number)  # before any device hears of it (decision 0140)
        self._written = None
        return self._taken_up(this)

    def _write_down(self, effect: OpenRound) -> rows.Round:
        assert self.task is not None  # noqa: S101 - a run has a task
        key = self._random(KEY_BYTES)
        with self.db.reading() as tx:
            number = tx.highest_round() + 1
        announcement = self.announcer.opening(effect, number, KemKey.from_seed(key).public)
        this = rows.Round(
            number=number,
            run_id=effect.run.id,
            announcement=self.announcer.sign(announcement),
            round_key=key,
            fleet_key=self.keys.fleet_key,
            model_before=self.model_version,
            opened_at=self._clock(),
        )
        with self.db.transaction() as tx:
            tx.open_round(this)
        self._fleet_key = this.fleet_key
        return this

    def _taken_up(self, this: rows.Round) -> tuple[Opened, bytes]:
        """An open round as it was written down; its announcement by the server's present keys."""
        assert this.round_key is not None  # noqa: S101 - it is open
        announcement: Announcement = messages.decode(
            self.announcer.payload(this.announcement), Announcement
        )
        signed = self.announcer.again(this.announcement)
        self._fleet_key = this.fleet_key
        return self._begin(announcement, signed, this.round_key), signed

    def _begin(self, announcement: Announcement, signed: bytes, key: bytes) -> Opened:
        specs = weights.specs_of(self.model)
        digest = sha256(self.announcer.payload(signed))
        self._open = self.intake(
            announcement, digest, KemKey.from_seed(key), specs, db=self.db, spool=self._spool,
            check_room=self._check_spool, clock=self._clock,
        )  # fmt: skip
        return Opened(announcement, digest, len(self.model_bytes))

    # ── updates ─────────────────────────────────────────────────────────────────────────

    @property
    def has_open_round(self) -> bool:
        """Whether a round is open."""
        return self._open is not None

    def upload_ids(self, device: str) -> tuple[bytes, ...]:
        """The ids this device may be given in the open round, one for each attempt."""
        assert self._open is not None  # noqa: S101 - asked only while a round is open
        return self._open.upload_ids(device)

    def begin_upload(self, device: rows.Device, init: Init) -> tuple[int, ...]:
        """Make room for an upload; return the chunks it lacks. Raises PeerError, LocalError."""
        assert self._open is not None  # noqa: S101 - asked only while a round is open
        return self._open.begin(device, init)

    def put_chunk(self, device: str, chunk: bytes) -> bytes | None:
        """Keep a chunk that opens; return its upload, if no other chunk is missing any more.

        Raises PeerError for a chunk that nobody asked for or that was altered.
        """
        if self._open is None:
            raise PeerError("unasked_upload", f"{device} sent a chunk while no round is open")
        return self._open.put_chunk(device, chunk)

    def accept(self, effects: Sequence[Accept], *, at_disk: AtDisk) -> list[Accepted | Refused]:
        """Open, check and sum complete updates; put them and their receipts on disk together.

        `at_disk` is entered while the disk is waited for.
        """
        assert self._open is not None  # noqa: S101 - asked only while a round is open
        return self._open.accept(effects, at_disk=at_disk)

    def refuse(self, device: str, upload: bytes, reason: str) -> None:
        """Write down that an upload was rejected, and drop what was stored of it."""
        if self._open is not None:
            self._open.refuse(device, upload, reason)
        self._spool.drop(upload)

    def forget(self, upload: bytes) -> None:
        """Drop what was stored of an attempt that its device replaced by another."""
        if self._open is not None:
            self._open.forget(upload)
        self._spool.drop(upload)

    def withdraw(self, device: str, reason: str) -> None:
        """Take back whatever a device gave to the open round. Raises LocalError."""
        if self._open is not None:
            for upload in self._open.withdraw(device, reason):
                self._spool.drop(upload)
                self._open.forget(upload)  # last: for want of room it is dropped again later

    def gone_devices(self) -> list[str]:
        """Devices that were revoked, and have an update in the open round all the same."""
        if self._open is None:
            return []
        with self.db.reading() as tx:
            return tx.gone_devices(self._open.announcement.round)

    def check_room(self, wanted_bytes: int = 0) -> None:
        """Raise DiskFullError when the disk has less room than is kept for models and receipts."""
        if self._untidy and self._open is None:
            self._tidy()
        if self._open is not None:  # there may have been no room for it at the start
            self._highest.note(self._open.announcement.round)
        # At the least what the next model and its receipts take, whatever the settings say.
        least = max(self._config.limits.disk_free_mb_min * _MB, 2 * len(self.model_bytes) + _MB)
        free = None if self._free_bytes is None else self._free_bytes(self._home.state)
        if free is not None and free - wanted_bytes < least:
            raise DiskFullError(
                f"{self._home.state}: the disk is full: {free // _MB} MB are free, and "
                f"{least // _MB} MB are kept for models and receipts; make room there, then this "
                "goes on by itself"
            )

    def _check_spool(self, layout: Layout) -> None:
        wanted = layout.total_bytes + layout.count * CHUNK_OVERHEAD_BYTES
        self.check_room(wanted)
        most = self._config.limits.spool_mb_max * _MB
        if most and self._spool.bytes_held + wanted > most:
            raise DiskFullError(f"the updates of this round hold their {most // _MB} MB already")

    # ── the end of a round ──────────────────────────────────────────────────────────────

    def close_round(self, summary: RoundSummary) -> tuple[int, bytes]:
        """Make the new model and write everything down; return its version and the
        signed announcement of the closed round.
        """
        this = self._open
        assert this is not None  # noqa: S101 - a round is closing
        number = this.announcement.round
        with self.db.reading() as tx:
            version = tx.highest_model() + 1
        made = self._line.write_next(this.sum.mean(), version=version, number=number)
        with self.db.transaction() as tx:
            tx.add_model(made.row)
            tx.close_round(
                number,
                model_after=version,
                closed_at=self._clock(),
                summary_json=_json(summary),
            )
            tx.count_round_done(summary.run)
        self._line.use_next(made)
        self._forget_round()
        return version, self.announcer.ending(this.announcement)

    def _forget_round(self) -> None:
        """The round is over: its key and its updates go, from the log of the database too."""
        self._open = self._fleet_key = None
        try:
            self._tidy()
        except DiskFullError as error:
            # The round's end is written down already: it must not be tried again for this.
            log.warning("%s (what the last round left behind goes once there is room)", error)

    def _tidy(self) -> None:
        """Remove what a round left behind, and old models but the newest one of each task."""
        self._untidy = True
        self._spool.clear()
        self.db.checkpoint()
        with self.db.reading() as tx:
            newest_of_each = tx.newest_models()
        self._models.prune(self._config.models_kept, also=newest_of_each)
        self._untidy = False

    def abandon_round(self, summary: RoundSummary) -> bytes:
        """Write down that the round ended without a model; return its signed end."""
        this = self._open
        assert this is not None  # noqa: S101 - a round is ending
        with self.db.transaction() as tx:
            tx.abandon_round(
                this.announcement.round, closed_at=self._clock(), summary_json=_json(summary)
            )
        self._forget_round()
        return self.announcer.ending(this.announcement)

    def measured(self, summary: RoundSummary) -> None:
        """Write down how a model did."""
        with self.db.transaction() as tx:
            tx.set_model_metrics(summary.model_version, _json(summary.evaluation))
            tx.set_round_summary(summary.round, _json(summary))

    def count_rejects(self, by: Mapping[str, int]) -> None:
        """Write down how many more messages were dropped, by reason."""
        with self.db.transaction() as tx:
            for reason, count in by.items():
                tx.count_rejects(reason, count)

    # ── coming back ─────────────────────────────────────────────────────────────────────

    def restore(self) -> Restored | None:
        """Find the run that was open when the server died, and its open round."""
        federation, now_s = self.keys.federation, self._clock()
        settle_old_copy(self.db, self._models, self._highest, federation, now_s=now_s)
        with self.db.reading() as tx:
            run, this = tx.current_run(), tx.current_round()
            model = None if run is None else tx.latest_model(run.task_digest)
            abandoned = 0 if run is None else tx.abandoned_in_a_row(run.id)
        receipts = [] if this is None else self._still_in(this.number)
        if run is None or model is None:
            self._spool.clear()
            return None
        self._line.use(self._tasks.load(self._tasks.named(run.task_name)), model)
        if self.task is None or self.task.plan.digest != run.task_digest:
            raise LocalError(
                f"the task file {run.task_name!r} was changed while run {run.id} was open; put the "
                "old file back, or give the run up with `midge stop --without-server`"
            )
        found = Run(
            id=run.id, task=run.task_name, rounds=run.rounds_total, rounds_done=run.rounds_done,
            until=msgspec.json.decode(run.until_json, type=Until | None), target=run.target,
            quorum=run.quorum, deadline_s=run.deadline_s, abandoned_in_a_row=abandoned,
        )  # fmt: skip
        if this is None or this.round_key is None:
            self._spool.clear()
            paused = run.status == "paused"
            return Restored(found, None, b"", [], 0.0, paused, self._last(run.id))
        opened, signed = self._taken_up(this)
        assert self._open is not None  # noqa: S101 - it was just taken up
        uploads = self._open.take_up(receipts)
        elapsed = max(0.0, self._clock() - this.opened_at)
        paused = run.status == "paused"
        return Restored(found, opened, signed, uploads, elapsed, paused)

    def _still_in(self, number: int) -> list[rows.Receipt]:
        """The receipts of the open round, after taking back those of whoever is revoked."""
        with self.db.reading() as tx:
            gone = tx.gone_devices(number)
        if gone:
            with self.db.transaction() as tx:
                for device in gone:
                    tx.withdraw(number, device, at=self._clock(), reason="the device was revoked")
        with self.db.reading() as tx:
            return tx.receipts(number)

    def recall(self) -> Recalled | None:
        """What was said last of the rounds that are over; None if that cannot be said again."""
        return recall(self.db, self._tasks, self._line, self.announcer)

    def _last(self, run_id: int) -> RoundSummary | None:
        """The run's newest round and how its model did, unless that round made no model."""
        with self.db.reading() as tx:
            ended = tx.rounds_of(run_id)[-1:]
            version = ended[0].model_after if ended else None
            model = None if version is None else tx.model(version)
        if model is None:
            return None
        return msgspec.structs.replace(
            msgspec.json.decode(ended[0].summary_json, type=RoundSummary),
            model_version=model.version,
            evaluation=msgspec.json.decode(model.metrics_json, type=dict[str, float]),
        )

    def close(self) -> None:
        """Let go of files."""
        self._spool.close()
        self.db.close()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
