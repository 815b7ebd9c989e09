"""The device's loop: receive, step, perform. It holds no rules about rounds.

One thread owns the link, the disk and the participant. Training runs in a second one,
so that the broker is answered while it goes on, and is stopped between two steps.
What a message says is believed only after its signature was verified, here.
"""

import hashlib
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Connected, Disconnected, Link, LinkEvent, Message
from broker_bridge.task.runtime import TaskRuntime
from broker_bridge.task.taskfile import Plan, Training, decode_plan
from broker_bridge.wire import blobs, messages, weights
from broker_bridge.wire.chunks import Reassembler
from broker_bridge.wire.envelope import KEY_BYTES, KemKey, random_bytes, sha256, verify
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Blob,
    Busy,
    Go,
    Init,
    Need,
    Presence,
    Settings,
)
from broker_bridge.wire.topics import DownTopic, Topics
from broker_bridge.wire.update import Binding, seal_update
from device_client import events as ev
from device_client.data import load_samples
from device_client.identity import Identity
from device_client.outbox import Outbox
from device_client.participant import Participant, State
from device_client.trainer import Progress, Trained, Trainer

__all__ = ["Agent", "Journal"]

log = logging.getLogger("midge.device")

_PRESENCE: dict[State, Literal["ready", "training", "uploading"]] = {
    State.IDLE: "ready",
    State.WAITING: "ready",
    State.JOINING: "ready",
    State.FETCHING: "training",
    State.TRAINING: "training",
    State.EVALUATING: "training",
    State.SEALING: "uploading",
    State.UPLOADING: "uploading",
}
_DETAIL_CHARS_MAX = 500  # what `Presence` takes; the log has the whole sentence
_DOWN = {"go": Go | Busy, "need": Need, "ack": Ack}


class Journal:
    """What a device writes down beside its identity: rounds seen, and how often it started."""

    def __init__(self, folder: Path) -> None:
        self._memory = folder / "rounds.json"
        self._boots = folder / "boots"
        self.folder = folder

    def memory(self) -> ev.Memory:
        """The highest round seen, and how far it went."""
        if not self._memory.exists():
            return ev.Memory()
        try:
            return msgspec.json.decode(self._memory.read_bytes(), type=ev.Memory)
        except msgspec.MsgspecError as error:
            raise LocalError(
                f"{self._memory} is damaged ({error}); restore it from a backup: without it "
                "an old announcement could be replayed to this device"
            ) from None

    def remember(self, memory: ev.Memory) -> None:
        """Write it down; when this returns, it survives."""
        write_atomic(self._memory, msgspec.json.encode(memory))

    def show(self, presence: Presence) -> None:
        """Leave the present state where `midge-device status` reads it. Need not survive."""
        path = self.folder / "status.json"
        fresh = path.with_suffix(".new")
        with disk_errors(path):
            fresh.write_bytes(messages.encode_json(presence))
            fresh.replace(path)

    def boot(self) -> int:
        """Count one more start of the process, and say which it is."""
        text = self._boots.read_text() if self._boots.exists() else "0"
        number = int(text) + 1 if text.isdecimal() else 1
        write_atomic(self._boots, str(number).encode())
        return number


@dataclass(frozen=True)
class _Collected:
    """A blob on its way."""

    blob: Blob
    pieces: Reassembler


class Agent:
    """One enrolled device at work."""

    def __init__(
        self,
        identity: Identity,
        link: Link,
        *,
        journal: Journal,
        data: str,
        role: Literal["train", "evaluate"] = "train",
        threads: int = 1,
        boot: int,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float],
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.identity = identity
        self.rejects: Counter[str] = Counter()
        self._topics = Topics(identity.federation)
        self._link = link
        self._journal = journal
        self._data = data
        self._threads = threads
        self._boot = boot
        self._clock = clock
        self._on_progress = on_progress
        self._outbox = Outbox(journal.folder / "outbox")
        self._participant = Participant(
            identity.device,
            memory=journal.memory(),
            samples=0,
            role=role,
            fleet_epoch=identity.fleet_epoch,
            draw=draw,
        )
        self._shard = 0
        self._shown: Presence | None = None
        self._collecting: dict[str, _Collected] = {}
        self._model: tuple[bytes, dict[str, NDArray[Any]]] | None = None
        self._plan: Plan | None = None
        self._trainer: Trainer | None = None
        self._trained: Trained | None = None
        self._worker: threading.Thread | None = None
        self._stop_work = threading.Event()
        self._results: queue.SimpleQueue[Callable[[], list[ev.Event]]] = queue.SimpleQueue()

    # ── the loop ────────────────────────────────────────────────────────────────────────

    def run(self, stopped: Callable[[], bool]) -> None:
        """Take part in rounds until `stopped` says so. Raises LocalError, LinkError."""
        self.begin()
        try:
            while not stopped():
                self.turn(self._link.receive(timeout_s=1.0))
        finally:
            self.end()

    def begin(self) -> None:
        """Take up what a power cut left in the outbox, and listen."""
        mine = self.identity.device
        self._link.subscribe([self._topics.round, self._topics.all_down(mine)])
        waiting = self._outbox.load()
        self._handle([] if waiting is None else [ev.Sealed(waiting)])

    def end(self) -> None:
        """Stop working and say so: whatever ended the loop, nobody waits for this device."""
        self._stop("the device is stopping")
        self._show(Presence(state="sleeping", boot=self._boot, role=self._participant.role))

    def turn(self, event: LinkEvent | None) -> None:
        """One turn: what came over the link, what the worker finished, and the time."""
        happened: list[ev.Event] = [ev.Tick(self._clock())]
        if event is not None:
            happened += self._understand(event)
        while not self._results.empty():
            happened += self._results.get()()
        self._handle(happened)
        self._handle([ev.Room(self._link.room())])
        if isinstance(event, Message):
            self._link.ack(event)
        self._show_state()

    def _handle(self, happened: Iterable[ev.Event]) -> None:
        todo = deque(happened)
        while todo:
            try:
                effects = self._participant.step(todo.popleft())
            except PeerError as error:
                self._reject(error, "the server's message")
                continue
            for effect in effects:
                todo.extend(self._perform(effect))

    def _reject(self, error: PeerError, what: str) -> None:
        self.rejects[error.reason] += 1
        log.warning("ignored %s: %s", what, error)

    # ── what a message says ─────────────────────────────────────────────────────────────

    def _understand(self, event: LinkEvent) -> list[ev.Event]:
        match event:
            case Connected(limits):
                log.info("connected to the broker")
                self._shown = None
                return [ev.LinkUp(limits.packet_bytes_max, limits.inflight_max)]
            case Disconnected(reason):
                log.warning("connection lost: %s", reason)
                return []
            case Message():
                try:
                    return self._read(event)
                except PeerError as error:
                    self._reject(error, f"a message on {event.topic}")
        return []

    def _read(self, message: Message) -> list[ev.Event]:
        match self._topics.parse(message.topic):
            case "round" if message.payload:
                return [self._announced(message.payload)]
            case ("task" | "model") as kind if message.payload:
                return self._collect(kind, message.payload)
            case DownTopic(device, kind) if device == self.identity.device and kind in _DOWN:
                answer = messages.opened(
                    self.identity.server_sign, kind, self.identity.scope, message.payload,
                    _DOWN[kind],
                )  # fmt: skip
                if isinstance(answer, Go):
                    self._shard = answer.shard
                return [ev.Answered(answer)]
        return []

    def _announced(self, signed: bytes) -> ev.Announced:
        federation = self.identity.federation
        payload = verify(self.identity.server_sign, f"round {federation}", signed)
        announcement: Announcement = messages.decode(payload, Announcement)
        if announcement.federation != federation:
            raise PeerError("other_federation", "an announcement of another federation")
        return ev.Announced(announcement, sha256(payload))

    def _collect(self, kind: str, chunk: bytes) -> list[ev.Event]:
        wanted = self._collecting.get(kind)
        if wanted is None:
            return []
        try:
            complete = wanted.pieces.add(chunk)
        except PeerError as error:
            if error.reason == "other_transfer":
                return []  # a chunk of the version before: the new one follows
            raise
        if not complete:
            return [ev.Fetching()]
        del self._collecting[kind]
        self._link.unsubscribe([self._filter(kind)])
        return self._fetched(kind, wanted.blob, blobs.finish(wanted.blob, wanted.pieces))

    def _filter(self, kind: str) -> str:
        return self._topics.all_tasks if kind == "task" else self._topics.all_models

    # ── what is to be done ──────────────────────────────────────────────────────────────

    def _perform(self, effect: ev.Effect) -> list[ev.Event]:
        match effect:
            case ev.Remember(memory):
                self._journal.remember(memory)
            case ev.Send(message):
                self._send(message)
            case ev.SendChunks(upload, indices):
                self._send_chunks(upload, indices)
            case ev.Fetch(kind, blob):
                return self._fetch(kind, blob)
            case ev.Train(number, settings):
                return self._train(number, settings)
            case ev.Evaluate(version):
                return self._evaluate(version)
            case ev.Seal(announcement, digest, go):
                return self._seal(announcement, digest, go)
            case ev.Discard():
                self._outbox.discard()
            case ev.Stop(reason):
                self._stop(reason)
        return []

    def _send(self, message: ev.Outgoing) -> None:
        kind = {"Join": "join", "Init": "init", "NeedBlob": "need", "Report": "report"}[
            type(message).__name__
        ]
        signed = messages.signed(self.identity.keys.sign, kind, self.identity.scope, message)
        self._publish(kind, signed)

    def _send_chunks(self, upload: bytes, indices: tuple[int, ...]) -> None:
        for index in indices:
            self._publish("data", self._outbox.chunk(upload, index))

    def _publish(self, kind: str, payload: bytes) -> None:
        topic = self._topics.up(self._shard, self.identity.device, kind)
        try:
            self._link.publish(topic, payload)
        except LinkError as error:
            log.warning("not sent: %s", error)  # the participant asks again after a silence

    # ── task and model ──────────────────────────────────────────────────────────────────

    def _fetch(self, kind: Literal["task", "model"], blob: Blob) -> list[ev.Event]:
        if kind == "model" and self._model is not None and self._model[0] == blob.digest:
            return [ev.Fetched("model", blob.digest)]
        cached = self._cached(blob.digest)
        if kind == "task" and cached is not None:
            return self._fetched(kind, blob, cached)
        try:
            pieces = blobs.collector(blob, fleet_key=self.identity.fleet_key)
        except PeerError as error:
            return [ev.Failed(self._participant.round, str(error))]
        self._collecting[kind] = _Collected(blob, pieces)
        self._link.subscribe([self._filter(kind)])
        return []

    def _fetched(self, kind: str, blob: Blob, content: bytes) -> list[ev.Event]:
        """Take in a task or model whose digest is the announced one."""
        try:
            if kind == "task":
                self._use_task(decode_plan(content), content)
                return [ev.Fetched("task", blob.digest)]
            found = weights.decode(content)
            if self._plan is not None:
                weights.check(found, self._plan.task.weights)
            self._model = (blob.digest, found)
            return [ev.Fetched("model", blob.digest)]
        except (PeerError, LocalError) as error:
            # Signed by our server and still unusable here: say so, sit this round out.
            log.error("cannot use the announced %s: %s", kind, error)
            return [ev.Failed(self._participant.round, str(error))]

    def _use_task(self, plan: Plan, content: bytes) -> None:
        if self._plan is not None and self._plan.digest == plan.digest:
            return
        runtime = TaskRuntime(plan, num_threads=self._threads)
        samples = load_samples(self._data, plan.task)
        self._trainer = Trainer(runtime, samples)
        self._plan = plan
        self._participant.samples = len(samples)
        path = self._task_path(plan.digest)
        if not path.exists():
            with disk_errors(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(path, content)
        log.info("task %s: %d samples here", plan.task.name, len(samples))

    def _task_path(self, digest: bytes) -> Path:
        return self._journal.folder / "tasks" / f"{digest.hex()[:16]}.plan"

    def _cached(self, digest: bytes) -> bytes | None:
        path = self._task_path(digest)
        if not path.exists():
            return None
        content = path.read_bytes()
        return content if sha256(content) == digest else None

    # ── training, evaluating, sealing ───────────────────────────────────────────────────

    def _train(self, number: int, settings: Settings) -> list[ev.Event]:
        trainer, model = self._trainer, self._model
        if trainer is None or model is None:
            return [ev.Failed(number, "the task is not loaded")]
        training = Training(
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            proximal_mu=settings.proximal_mu,
            clip_norm=settings.clip_norm,
        )
        # The same round on the same device trains alike, so a power cut changes nothing.
        drawn = hashlib.sha256(self.identity.scope.encode() + number.to_bytes(8, "big")).digest()
        seed = int.from_bytes(drawn[:8], "big")

        def work() -> list[ev.Event]:
            trained = trainer.train(model[1], training, seed=seed, on_step=self._step_done)
            if trained is None:
                return []
            self._trained = trained
            log.info(
                "round %d: trained %d steps in %.2f s, loss %.4f",
                number, trained.steps, trained.seconds, trained.loss,
            )  # fmt: skip
            return [ev.Trained(number)]

        log.info("round %d: training", number)
        self._start(work, number)
        return []

    def _evaluate(self, version: int) -> list[ev.Event]:
        trainer, model, number = self._trainer, self._model, self._participant.round
        if trainer is None or model is None:
            return [ev.Failed(number, "the task is not loaded")]

        def work() -> list[ev.Event]:
            found = trainer.evaluate(model[1])
            log.info("model %d: %s on %d samples", version, found.metrics, found.examples)
            metrics = {"loss": found.loss} | found.metrics
            return [ev.Evaluated(version, found.examples, metrics)]

        self._start(work, number)
        return []

    def _start(self, work: Callable[[], list[ev.Event]], number: int) -> None:
        """Run `work` in the second thread; its events are handled in the first."""
        self._stop("new work")
        stop = self._stop_work = threading.Event()

        def run() -> None:
            try:
                events = work()
                result: Callable[[], list[ev.Event]] = lambda: events  # noqa: E731
            except (PeerError, LocalError) as error:
                failed: list[ev.Event] = [ev.Failed(number, str(error))]
                log.error("round %d: %s", number, error)
                result = lambda: failed  # noqa: E731
            except Exception as error:  # our bug: crash in the thread that owns the process
                bug = error

                def result() -> list[ev.Event]:
                    raise bug

            if not stop.is_set():
                self._results.put(result)
                self._link.wake()

        self._worker = threading.Thread(target=run, name="midge-training", daemon=True)
        self._worker.start()

    def _step_done(self, progress: Progress) -> bool:
        self._on_progress(progress)
        return not self._stop_work.is_set()

    def _stop(self, reason: str) -> None:
        self._stop_work.set()
        for kind in list(self._collecting):
            del self._collecting[kind]
            self._link.unsubscribe([self._filter(kind)])
        if self._worker is not None and self._worker.is_alive():
            log.info("training stopped: %s", reason)
            self._worker.join()
        self._worker = None

    def _seal(self, announcement: Announcement, digest: bytes, go: Go) -> list[ev.Event]:
        trained, model = self._trained, self._model
        self._trained = None
        if trained is None or model is None:
            return [ev.Failed(announcement.round, "there is nothing to send")]
        identity = self.identity
        message = weights.encode(_delta(trained.weights, model[1], announcement.delta_bound))
        sealed = seal_update(
            message,
            Binding(identity.federation, identity.device, digest, go.upload),
            round_key=announcement.round_key,
            sender=identity.keys.kem,
            psk=identity.psk,
            ephemeral=KemKey.from_seed(random_bytes(KEY_BYTES)),
            packet_bytes=go.packet_bytes,
        )
        init = Init(
            round=announcement.round,
            announcement=digest,
            upload=go.upload,
            enc=sealed.enc,
            total_bytes=len(message),
            body_bytes=sealed.layout.body_bytes,
            tags=sealed.tags,
            examples=min(trained.examples, announcement.weight_max),
            train_s=trained.seconds,
            metrics={"loss": trained.loss} | trained.metrics,
        )
        try:
            self._outbox.put(init, sealed)
        except LocalError as error:
            return [ev.Failed(announcement.round, str(error))]
        return [ev.Sealed(init)]

    # ── presence ────────────────────────────────────────────────────────────────────────

    def _show_state(self) -> None:
        person = self._participant
        self._show(
            Presence(
                state=_PRESENCE[person.state],
                boot=self._boot,
                role=person.role,
                round=person.round,
                detail=person.detail[:_DETAIL_CHARS_MAX] if person.state is State.IDLE else "",
            )
        )

    def _show(self, presence: Presence) -> None:
        if presence == self._shown:
            return
        self._shown = presence
        self._journal.show(presence)
        try:
            topic = self._topics.state(self.identity.device)
            self._link.publish(topic, messages.encode_json(presence), retain=True)
        except LinkError as error:
            log.warning("not sent: %s", error)


def _delta(
    new: dict[str, NDArray[Any]], old: dict[str, NDArray[Any]], bound: float
) -> dict[str, NDArray[np.float32]]:
    """What training changed, scaled down to the L2 norm that the round allows.

    Clipping whole updates: McMahan et al. 2018 (arXiv:1710.06963), Algorithm 1.
    """
    delta = {name: np.subtract(new[name], old[name], dtype=np.float32) for name in old}
    norm = float(
        np.sqrt(sum(float(np.sum(np.square(d, dtype=np.float64))) for d in delta.values()))
    )
    if norm <= bound:
        return delta
    return {name: (d * np.float32(bound / norm)).astype(np.float32) for name, d in delta.items()}
