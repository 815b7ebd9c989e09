"""What a run writes down: rounds, sealed updates, receipts, sums and models. No network.

The order of writing is the promise. An update is accepted when its chunks and its
receipt are on the disk, and only then may its device hear so. A model is a file before
its row exists, and its row, the end of its round and the run's progress are one
transaction. So after a kill at any instruction `restore` finds a run that goes on:
the sum is made again from the updates that have a receipt, to the same bits, because
exact sums do not care for order.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

from broker_bridge.disk import REAL_DISK, Disk, DiskFullError, disk_errors
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.taskfile import Plan, decode_task, encode_plan
from broker_bridge.wire import blobs, messages, weights
from broker_bridge.wire.chunks import (
    CHUNK_OVERHEAD_BYTES,
    Layout,
    chunk_header,
    open_chunk,
    tags_digest,
)
from broker_bridge.wire.envelope import (
    AEAD_TAG_BYTES,
    KEY_BYTES,
    ChunkKey,
    KemKey,
    random_bytes,
    sha256,
    verify,
)
from broker_bridge.wire.lottery import EVERYONE
from broker_bridge.wire.messages import Announcement, Blob, Init, RoundSummary, Settings, Until
from broker_bridge.wire.update import Binding, update_key
from server import cohort
from server.aggregation.bounds import check_update
from server.aggregation.exact import ExactSum
from server.aggregation.optimisers import FedAdam, FedAvg, FedAvgM, FedYogi, ServerOptimiser
from server.config import ServerConfig
from server.events import Accept, Accepted, Opened, OpenRound, Refused, Run, Upload
from server.fleet.home import Home, ServerKeys
from server.store import rows
from server.store.database import Database
from server.store.models import ModelFiles
from server.store.spool import Spool

__all__ = ["ATTEMPTS_MAX", "Ledger", "Restored"]

log = logging.getLogger("midge.server")

ATTEMPTS_MAX = 8  # uploads a device may begin in one round
_JITTER_DEVICES_PER_S = 200  # pace steering: joins are spread so that so many come in a second
_JITTER_BYTES_PER_S = 30e6  # and their updates no faster than two cores take them in

_MB = 1_000_000

_OPENED_BYTES_MAX = 64 * 1024 * 1024  # of updates on their way that are kept as opened, too
_SHARED_BYTES_MAX = 256 * 1024  # updates up to this share a file: one sync for many

Weights = dict[str, NDArray[Any]]


@dataclass
class LoadedTask:
    """A task that a run trains."""

    plan: Plan
    plan_bytes: bytes
    initial: Weights


@dataclass
class _Open:
    """The open round, in memory."""

    announcement: Announcement
    digest: bytes
    key: KemKey
    sum: ExactSum
    uploads: dict[bytes, "_Incoming"] = field(default_factory=dict)


@dataclass(frozen=True)
class _Incoming:
    device: str
    init: Init
    key: ChunkKey
    opened: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # body and tag, by index


@dataclass(frozen=True)
class Restored:
    """A run that was open when the server died."""

    run: Run
    opened: Opened | None
    signed: bytes  # the open round's announcement, as it was first published
    uploads: list[Upload]
    elapsed_s: float
    paused: bool
    last: RoundSummary | None = None  # of the run's newest round, if that one made a model


class Ledger:
    """The memory of one federation's server. One thread uses it."""

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
        self.task: LoadedTask | None = None
        self.model: Weights = {}
        self.model_version = 0
        self.model_bytes = b""
        self._home = home
        self._config = config
        self._clock = clock  # seconds since 1970: for people, and for deadlines after a restart
        self._random = random
        self._disk = disk
        self._free_bytes = free_bytes  # of the disk that a path is on; None: nobody knows
        self._models = ModelFiles(home.state / "models", disk=disk)
        self._spool = Spool(
            home.state / "spool", shared_bytes_max=_SHARED_BYTES_MAX, disk=disk, random=random
        )
        self._optimiser: ServerOptimiser = FedAvg()
        self._optimiser_state: Weights = {}
        self._open: _Open | None = None
        self._opened_bytes = 0
        self._untidy = False  # whether a full disk kept what a round left behind

    # ── tasks and runs ──────────────────────────────────────────────────────────────────

    def tasks(self) -> dict[str, Path]:
        """The task files that a start may name, by file name without `.task`."""
        folder = self._home.folder / "tasks"
        with disk_errors(folder):
            names = self._disk.names(folder) if self._disk.exists(folder) else []
        found = [
            *(folder / n for n in names if n.endswith(".task")),
            *map(Path, self._config.tasks),
        ]
        return {path.stem: path for path in found}

    def start(self, run: Run) -> Run:
        """Load the task, find or make its first model, write the run down.

        Raises LocalError with a sentence for the operator.
        """
        path = self._named(run.task)
        task = self._load(path)
        # By the file's name, as the operator named it: `restore` looks for the file again.
        name = path.stem
        with self.db.transaction() as tx:
            model = tx.latest_model(task.plan.digest)
            if model is None:
                model = self._first_model(task, tx.highest_model() + 1)
                tx.add_model(model)
            self._use(task, model)  # first: a run whose model cannot be read must not begin
            self._check_size()
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

    def _named(self, name: str) -> Path:
        tasks = self.tasks()
        if not name and len(tasks) == 1:
            return next(iter(tasks.values()))
        if name in tasks:
            return tasks[name]
        known = ", ".join(sorted(tasks)) or "none"
        raise LocalError(
            f"there is no task {name!r} here; known are: {known}. Put NAME.task into "
            "the fleet's folder tasks/, or start the server with --task FILE"
        )

    def _load(self, path: Path) -> LoadedTask:
        with disk_errors(path):
            data = self._disk.read(path)
        try:
            plan, initial = decode_task(data)
        except PeerError as error:
            raise LocalError(f"{path}: {error}") from None
        return LoadedTask(plan, encode_plan(plan.task, plan.tflite), initial)

    def _first_model(self, task: LoadedTask, version: int) -> rows.Model:
        data = weights.encode(task.initial)
        return rows.Model(
            version=max(version, 1),
            task_digest=task.plan.digest,
            digest=self._models.write(max(version, 1), data),
            size_bytes=len(data),
            round=0,
            created_at=self._clock(),
        )

    def _use(self, task: LoadedTask, model: rows.Model) -> None:
        self.task = task
        self.model_bytes = self._models.read(model.version, model.digest)
        self.model = weights.decode(self.model_bytes)
        self.model_version = model.version
        specs = weights.specs_of(self.model)
        statistics = task.plan.task.weights[task.plan.task.trainable_count :]
        self._optimiser = _optimiser(self._config, frozenset(spec.name for spec in statistics))
        self._optimiser_state = self._optimiser.init(specs)
        if model.optimiser_state_digest is not None:
            data = self._models.read(model.version, model.optimiser_state_digest, kind="optimiser")
            state = weights.decode(data)
            if weights.specs_of(state) == weights.specs_of(self._optimiser_state):
                self._optimiser_state = state

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
        """Make a round and write it down; return it and its signed announcement."""
        assert self.task is not None  # noqa: S101 - a run has a task
        key = self._random(KEY_BYTES)
        with self.db.reading() as tx:
            number = tx.highest_round() + 1
        announcement = self._announcement(effect, number, KemKey.from_seed(key).public)
        signed = self.sign(announcement)
        with self.db.transaction() as tx:
            tx.open_round(
                rows.Round(
                    number=number,
                    run_id=effect.run.id,
                    announcement=signed,
                    round_key=key,
                    model_before=self.model_version,
                    opened_at=self._clock(),
                )
            )
        return self._begin(announcement, signed, key), signed

    def _begin(self, announcement: Announcement, signed: bytes, key: bytes) -> Opened:
        specs = weights.specs_of(self.model)
        payload = verify(self.keys.sign.public, f"round {self.keys.federation}", signed)
        digest = sha256(payload)
        total = ExactSum(
            specs,
            fraction_bits=announcement.fraction_bits,
            weight_max=announcement.weight_max,
        )
        self._open = _Open(announcement, digest, KemKey.from_seed(key), total)
        return Opened(announcement, digest, len(self.model_bytes))

    def _announcement(self, effect: OpenRound, number: int, round_key: bytes) -> Announcement:
        assert self.task is not None  # noqa: S101 - a run has a task
        rounds = self._config.rounds
        return Announcement(
            federation=self.keys.federation,
            round=number,
            state="open",
            task=self.task_blob(),
            task_name=self.task.plan.task.name,
            model=self.model_blob(),
            model_version=self.model_version,
            settings=self._settings(),
            delta_bound=rounds.delta_bound,
            weight_max=rounds.weight_max,
            fraction_bits=rounds.fraction_bits,
            round_key=round_key,
            fleet_epoch=self.keys.fleet_epoch,
            issued_at=self._clock(),
            deadline_s=effect.run.deadline_s,
            target=effect.target,
            quorum=effect.quorum,
            lottery_seed=self._random(32),
            lottery_threshold=cohort.threshold(effect.online, effect.target),
            jitter_s=self._jitter_s(effect),
        )

    def _jitter_s(self, effect: OpenRound) -> float:
        """Pace steering: how long to spread the joins of those who will be drawn."""
        drawn = effect.online * cohort.threshold(effect.online, effect.target) / EVERYONE
        in_bytes_s = drawn * len(self.model_bytes) / _JITTER_BYTES_PER_S
        return float(int(max(drawn / _JITTER_DEVICES_PER_S, in_bytes_s)))

    def _settings(self) -> Settings:
        assert self.task is not None  # noqa: S101 - a run has a task
        defaults = msgspec.structs.asdict(self.task.plan.task.defaults)
        given = msgspec.structs.asdict(self._config.training)
        chosen = defaults | {name: value for name, value in given.items() if value is not None}
        return Settings(**{name: chosen[name] for name in given})

    def sign(self, announcement: Announcement) -> bytes:
        """The announcement as it is published."""
        return messages.signed(self.keys.sign, "round", self.keys.federation, announcement)

    def task_blob(self) -> Blob:
        """How the task lies on the broker."""
        assert self.task is not None  # noqa: S101 - a run has a task
        return blobs.describe(self.task.plan_bytes, packet_bytes=self.packet_bytes)

    def model_blob(self) -> Blob:
        """How the model lies on the broker."""
        return blobs.describe(self.model_bytes, packet_bytes=self.packet_bytes)

    def _check_size(self) -> None:
        """Raise LocalError if task or model would be cut into more chunks than there may be."""
        try:
            self.task_blob(), self.model_blob()
        except PeerError:
            raise LocalError(
                f"the broker takes packets of {self.packet_bytes} bytes, too small for a model of "
                f"{len(self.model_bytes)} bytes; raise max_packet_size in mosquitto.conf"
            ) from None

    packet_bytes = 60 * 1024  # what the broker takes; the service sets it from CONNACK

    # ── updates ─────────────────────────────────────────────────────────────────────────

    def upload_ids(self, device: str) -> tuple[bytes, ...]:
        """The ids this device may be given in the open round, one for each attempt.

        Derived from the round's key, so that they need not be written down: after a
        restart an id still proves that its device was let in.
        """
        assert self._open is not None  # noqa: S101 - asked only while a round is open
        start = self._open.key.seed + device.encode()
        return tuple(
            sha256(b"midge v1 upload id" + bytes([attempt]) + start)[:8]
            for attempt in range(ATTEMPTS_MAX)
        )

    @property
    def has_open_round(self) -> bool:
        """Whether a round is open."""
        return self._open is not None

    def begin_upload(self, device: rows.Device, init: Init) -> tuple[int, ...]:
        """Make room for an upload; return the chunks it lacks. Raises PeerError, LocalError."""
        this = self._open
        assert this is not None  # noqa: S101 - asked only while a round is open
        if init.upload not in self._spool.uploads():
            self._check_spool(init.layout)
        incoming = this.uploads.get(init.upload)
        if incoming is None:
            binding = Binding(self.keys.federation, device.name, this.digest, init.upload)
            key = update_key(
                init.enc, binding, round_key=this.key, sender=device.kem_public, psk=device.psk
            )
            incoming = _Incoming(device.name, init, key)
        self._spool.begin(init.upload, init.layout)
        this.uploads[init.upload] = incoming
        return tuple(self._spool.missing(init.upload))

    def check_room(self, wanted_bytes: int = 0) -> None:
        """Raise DiskFullError when the disk has less room than is kept for models and receipts."""
        if self._untidy and self._open is None:
            self._tidy()
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

    def put_chunk(self, device: str, chunk: bytes) -> tuple[bytes, int]:
        """Keep a chunk that opens; return its upload and how many are still missing.

        Raises PeerError for a chunk that nobody asked for or that was altered.
        """
        header = chunk_header(chunk)
        incoming = self._open.uploads.get(header.transfer) if self._open else None
        if incoming is None or incoming.device != device:
            raise PeerError("unasked_upload", f"{device} sent a chunk that nobody asked for")
        incoming.init.layout.check(header, chunk)
        body = open_chunk(chunk, incoming.key)
        if self._spool.put(header.transfer, header.index, chunk):
            self._remember(incoming, header.index, body, chunk[-AEAD_TAG_BYTES:])
        return header.transfer, self._spool.lacks(header.transfer)

    def _remember(self, incoming: _Incoming, index: int, body: bytes, tag: bytes) -> None:
        """Keep what was opened, while there is room: else it is read and opened once more."""
        room = self._opened_bytes + len(body) <= _OPENED_BYTES_MAX
        if room and index not in incoming.opened:
            self._opened_bytes += len(body)
            incoming.opened[index] = body, tag

    def _let_go(self, incoming: _Incoming) -> None:
        """Forget what was kept of an update."""
        self._opened_bytes -= sum(len(body) for body, _ in incoming.opened.values())
        incoming.opened.clear()

    def accept(self, effects: Sequence[Accept]) -> list[Accepted | Refused]:
        """Open, check and sum complete updates; put them and their receipts on disk together."""
        results: list[Accepted | Refused] = []
        good: list[Accept] = []
        for effect in effects:
            try:
                self._add(effect.init)
                good.append(effect)
            except PeerError as error:
                results.append(self._not_added(effect.init, error))
        try:
            self._commit(good)
        except (LocalError, PeerError) as error:
            # Nothing of this group is promised: the sum goes back to what has a receipt.
            log.error("cannot keep updates: %s", error)
            self._sum_again()
            status: Literal["busy", "resend"] = (
                "busy" if isinstance(error, DiskFullError) else "resend"
            )
            return results + [Refused(e.init.upload, status, str(error)) for e in good]
        return results + [Accepted(e.init.upload) for e in good]

    def _add(self, init: Init) -> None:
        this = self._open
        assert this is not None  # noqa: S101 - asked only while a round is open
        incoming = this.uploads[init.upload]
        deltas = weights.decode(self._at_hand(incoming) or self._opened(incoming))
        self._let_go(incoming)
        weights.check(deltas, this.sum.specs)
        check_update(deltas, delta_bound=this.announcement.delta_bound)
        this.sum.add(deltas, init.examples)

    def _at_hand(self, incoming: _Incoming) -> bytes | None:
        """The update, if every chunk of it is still in memory as it was opened."""
        count = incoming.init.layout.count
        if len(incoming.opened) < count:
            return None
        opened = [incoming.opened[index] for index in range(count)]
        if tags_digest(tag for _, tag in opened) != incoming.init.tags:
            self._let_go(incoming)
            raise PeerError("bad_seal", "the chunks are not those that the device committed to")
        return b"".join(body for body, _ in opened)

    def _opened(self, incoming: _Incoming) -> bytes:
        init = incoming.init
        bodies: list[bytes] = []
        torn: list[int] = []
        chunks = list(self._spool.chunks(init.upload, init.layout))
        for index, chunk in enumerate(chunks):
            try:
                bodies.append(open_chunk(chunk, incoming.key))
            except PeerError:
                torn.append(index)
        for index in torn:
            self._spool.forget(init.upload, index)
        if torn:
            raise PeerError("torn", f"{len(torn)} chunks were torn on our disk")
        if tags_digest(chunks) != init.tags:
            raise PeerError("bad_seal", "the chunks are not those that the device committed to")
        return b"".join(bodies)

    def _not_added(self, init: Init, error: PeerError) -> Refused:
        if error.reason == "torn":
            return Refused(init.upload, "resend", str(error))
        return Refused(init.upload, "rejected", f"{error.reason}: {error}")

    def _commit(self, effects: Sequence[Accept]) -> None:
        if not effects:
            return
        self._spool.sync([e.init.upload for e in effects])
        with self.db.transaction() as tx:
            tx.add_accepted([self._receipt(e.device, e.init, "accepted") for e in effects])

    def _receipt(
        self, device: str, init: Init, status: rows.ReceiptStatus, reason: str = ""
    ) -> rows.Receipt:
        return rows.Receipt(
            upload=init.upload,
            round=init.round,
            device=device,
            init=messages.encode(init),
            status=status,
            reason=reason,
            examples=init.examples,
            metrics_json=_json(init.metrics),
            at=self._clock(),
        )

    def refuse(self, device: str, upload: bytes, reason: str) -> None:
        """Write down that an upload was rejected, and drop what was stored of it."""
        incoming = self._open.uploads.pop(upload, None) if self._open else None
        if incoming is not None:
            self._let_go(incoming)
            with self.db.transaction() as tx:
                tx.add_receipt(self._receipt(device, incoming.init, "rejected", reason[:500]))
        self._spool.drop(upload)

    def forget(self, upload: bytes) -> None:
        """Drop what was stored of an attempt that its device replaced by another."""
        incoming = self._open.uploads.pop(upload, None) if self._open else None
        if incoming is not None:
            self._let_go(incoming)
        self._spool.drop(upload)

    # ── the end of a round ──────────────────────────────────────────────────────────────

    def close_round(self, summary: RoundSummary) -> tuple[int, bytes]:
        """Make the new model and write everything down; return its version and the
        signed announcement of the closed round.
        """
        this, task = self._open, self.task
        assert this is not None  # noqa: S101 - a round is closing
        assert task is not None  # noqa: S101
        new, state = self._optimiser.apply(self.model, this.sum.mean(), self._optimiser_state)
        with self.db.reading() as tx:
            version = tx.highest_model() + 1
        data = weights.encode(new)
        state_digest = None
        if state:
            state_digest = self._models.write(version, weights.encode(state), kind="optimiser")
        row = rows.Model(
            version=version,
            task_digest=task.plan.digest,
            digest=self._models.write(version, data),
            size_bytes=len(data),
            round=this.announcement.round,
            created_at=self._clock(),
            optimiser_state_digest=state_digest,
        )
        with self.db.transaction() as tx:
            tx.add_model(row)
            tx.close_round(
                this.announcement.round,
                model_after=version,
                closed_at=self._clock(),
                summary_json=_json(summary),
            )
            tx.count_round_done(summary.run)
        self.model, self.model_bytes, self.model_version = new, data, version
        self._optimiser_state = state
        self._forget_round()
        return version, self.closed_announcement(this.announcement)

    def _forget_round(self) -> None:
        """The round is over: its key and its updates go, from the log of the database too."""
        self._open, self._opened_bytes = None, 0
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

    def closed_announcement(self, opened: Announcement) -> bytes:
        """The signed end of a round: it names the newest model."""
        return self.sign(
            msgspec.structs.replace(
                opened, state="closed", model=self.model_blob(), model_version=self.model_version
            )
        )

    def abandon_round(self, summary: RoundSummary) -> bytes:
        """Write down that the round ended without a model; return its signed end."""
        this = self._open
        assert this is not None  # noqa: S101 - a round is ending
        with self.db.transaction() as tx:
            tx.abandon_round(
                this.announcement.round, closed_at=self._clock(), summary_json=_json(summary)
            )
        self._forget_round()
        return self.closed_announcement(this.announcement)

    def measured(self, summary: RoundSummary) -> None:
        """Write down how a model did."""
        with self.db.transaction() as tx:
            tx.set_model_metrics(summary.model_version, _json(summary.evaluation))

    # ── coming back ─────────────────────────────────────────────────────────────────────

    def restore(self) -> Restored | None:
        """Find the run that was open when the server died, and its open round."""
        with self.db.reading() as tx:
            run, this = tx.current_run(), tx.current_round()
            model = None if run is None else tx.latest_model(run.task_digest)
            receipts = [] if this is None else tx.receipts(this.number)
        if run is None or model is None:
            self._spool.clear()
            return None
        self._use(self._load(self._named(run.task_name)), model)
        if self.task is None or self.task.plan.digest != run.task_digest:
            raise LocalError(
                f"the task file {run.task_name!r} was changed while run {run.id} was open; put the "
                "old file back, or send stop and start anew"
            )
        found = Run(
            id=run.id, task=run.task_name, rounds=run.rounds_total, rounds_done=run.rounds_done,
            until=msgspec.json.decode(run.until_json, type=Until | None), target=run.target,
            quorum=run.quorum, deadline_s=run.deadline_s,
        )  # fmt: skip
        if this is None or this.round_key is None:
            self._spool.clear()
            paused = run.status == "paused"
            return Restored(found, None, b"", [], 0.0, paused, self._last(run.id))
        payload = verify(self.keys.sign.public, f"round {self.keys.federation}", this.announcement)
        announcement: Announcement = messages.decode(payload, Announcement)
        opened = self._begin(announcement, this.announcement, this.round_key)
        uploads = self._take_up(receipts)
        elapsed = max(0.0, self._clock() - this.opened_at)
        paused = run.status == "paused"
        return Restored(found, opened, this.announcement, uploads, elapsed, paused)

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

    def _take_up(self, receipts: Iterable[rows.Receipt]) -> list[Upload]:
        """Sum the updates that have a receipt, from their sealed chunks on disk."""
        assert self._open is not None  # noqa: S101 - the round was just taken up
        uploads: list[Upload] = []
        for receipt in receipts:
            init: Init = messages.decode(receipt.init, Init)
            if receipt.status == "accepted":
                with self.db.reading() as tx:
                    device = tx.device(receipt.device)
                if device is None:
                    raise LocalError(f"the database lost the device {receipt.device!r}")
                self.begin_upload(device, init)
                self._add_promised(receipt.device, init)
            uploads.append(
                Upload(
                    receipt.device,
                    receipt.upload,
                    packet_bytes=0,
                    init=init,
                    status="accepted" if receipt.status == "accepted" else "rejected",
                    reason=receipt.reason,
                )
            )
        return uploads

    def _sum_again(self) -> None:
        """After a failed commit: the sum of exactly those updates that have a receipt."""
        this = self._open
        assert this is not None  # noqa: S101 - a commit failed in it
        this.sum = ExactSum(
            this.sum.specs, fraction_bits=this.sum.fraction_bits, weight_max=this.sum.weight_max
        )
        with self.db.reading() as tx:
            receipts = tx.receipts(this.announcement.round, status="accepted")
        for receipt in receipts:
            self._add_promised(receipt.device, messages.decode(receipt.init, Init))

    def _add_promised(self, device: str, init: Init) -> None:
        """Add an update that has a receipt; without it there is no model of this round."""
        try:
            self._add(init)
        except PeerError as error:
            raise LocalError(
                f"{self._spool.folder}/{init.upload.hex()}.update: the update of {device} has a "
                f"receipt and cannot be read ({error}); check the disk, and restore the fleet's "
                "folder from a backup"
            ) from error

    def close(self) -> None:
        """Let go of files."""
        self._spool.close()
        self.db.close()


def _optimiser(config: ServerConfig, plain: frozenset[str]) -> ServerOptimiser:
    """The configured rule; the tensors in `plain` (statistics) are averaged by FedAvg anyway."""
    rate = config.aggregation.learning_rate
    match config.aggregation.optimiser:
        case "fedavg":
            return FedAvg(learning_rate=rate, plain=plain)
        case "fedavgm":
            return FedAvgM(learning_rate=rate, plain=plain)
        case "fedadam":
            return FedAdam(learning_rate=rate, plain=plain)
        case "fedyogi":
            return FedYogi(learning_rate=rate, plain=plain)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
