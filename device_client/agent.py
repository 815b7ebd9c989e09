"""The device's loop: receive, step, perform. It holds no rules about rounds.

One thread owns the link, the disk and the participant; training runs beside it, on the
workbench, so that the broker is answered while it goes on.
What a message says is believed only after `hearing.py` has verified its signature.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import LinkError, LocalError, PeerError
from broker_bridge.link.base import Connected, Disconnected, Link, LinkEvent, Message
from broker_bridge.task.taskfile import Plan
from broker_bridge.wire import messages
from broker_bridge.wire.envelope import random_bytes
from broker_bridge.wire.messages import Ack, Blob, Go, NeedBlob
from broker_bridge.wire.topics import DownTopic, Topics
from device_client import events as ev
from device_client import hearing
from device_client.background import Background, ThreadBackground
from device_client.collecting import Collected, Collecting
from device_client.eligibility import Verdict
from device_client.identity import Identity
from device_client.journal import Journal
from device_client.nameplate import Nameplate
from device_client.outbox import Outbox
from device_client.own_models import OwnModels
from device_client.papers import Papers
from device_client.participant import Participant, State
from device_client.permission import Permission
from device_client.sealing import sealed
from device_client.trainer import LocalTrainer, NotLoadedError
from device_client.workbench import Workbench

__all__ = ["Agent"]

log = logging.getLogger("midge.device")

_ROOM_S = 5.0  # how often to look whether a full disk has room again


class Agent:
    """One enrolled device at work."""

    def __init__(
        self,
        identity: Identity,
        link: Link,
        *,
        journal: Journal,
        load: Callable[[Plan], LocalTrainer],
        role: Literal["train", "evaluate"] = "train",
        boot: int,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float],
        background: Background | None = None,
        random: Callable[[int], bytes] = random_bytes,
        relink: Callable[[Link, Identity], Link] | None = None,
        software: str = "",
        judged: Callable[[int | None], list[Verdict]] | None = None,
        keeps_model: bool = False,
        personal_epochs: int = 0,
    ) -> None:
        """`relink` ends a link and makes another, with the certificate of a new identity; without
        it, the new certificate is used when the process starts again. `judged` says what the
        owner's rules say now, given the number of samples. `keeps_model`: for this device's own
        programs (device_client/model.py); `personal_epochs`: how long to train it on for them."""
        self.rejects: Counter[str] = Counter()
        self._topics = Topics(identity.federation)
        self._link = link
        self._journal = journal
        self._clock = clock
        self._random = random
        self._bench = Workbench(
            journal.folder, scope=identity.scope, load=load, disk=journal.disk,
            background=background or ThreadBackground(lambda: self._link.wake()),
        )  # fmt: skip
        self._outbox = Outbox(journal.folder / "outbox", disk=journal.disk)
        self._papers = Papers(identity, journal, self._outbox, random=random, software=software)
        self._relink = relink
        self._permission = Permission(judged, clock)
        self._own_models = OwnModels(
            journal.folder, self._bench, wanted=keeps_model, personal_epochs=personal_epochs,
            disk=journal.disk,
        )  # fmt: skip
        self._begin_anew = partial(Participant, identity.device, role=role, draw=draw)
        self._participant = self._as_after_a_power_cut()
        self._room_at_s: float | None = None  # when to look whether a full disk has room again
        self._shard = 0
        state = self._topics.state(identity.device)
        self._nameplate = Nameplate(state, journal, boot=boot, clock=clock)
        self._collecting = Collecting(self._topics)
        self._was_connected = False

    @property
    def identity(self) -> Identity:
        """Who this device is, as of now."""
        return self._papers.identity

    @property
    def link(self) -> Link:
        """The present connection."""
        return self._link

    @property
    def round(self) -> int:
        """The round this device is in, or the last one it saw."""
        return self._participant.round

    @property
    def state(self) -> State:
        """Where this device is in a round. While IDLE, only a message can change anything."""
        return self._participant.state

    def _as_after_a_power_cut(self) -> Participant:
        """The participant that the disk remembers."""
        return self._begin_anew(
            memory=self._journal.memory(),
            samples=self._bench.samples,
            fleet_epochs=frozenset(self.identity.fleet_keys),
            kept_version=self._own_models.version(),
        )

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
        self._journal.settle()
        self._link.subscribe(self._asking_for)
        waiting = self._outbox.load()
        self._handle([] if waiting is None else [ev.Sealed(waiting)])
        if self._papers.are_unsettled:
            self._handle([ev.RenewalAsked(keys=True)])

    @property
    def _asking_for(self) -> list[str]:
        topics = self._topics
        return [topics.identity, topics.round, topics.all_down(self.identity.device)]

    def end(self) -> None:
        """Stop working and say so: whatever ended the loop, nobody waits for this device."""
        self._stop("the device is stopping")
        self._nameplate.show_asleep(self._participant, self._link)

    def turn(self, event: LinkEvent | None) -> None:
        """One turn: what came over the link, what the worker finished, and the time."""
        try:
            self._look_for_room()
            self._work(event)
        except DiskFullError as error:
            self._no_room(error)
        if isinstance(event, Message):
            self._link.ack(event)
        self._nameplate.show(self._participant, self._bench.measured, self._link)
        self._connect_anew()

    def _connect_anew(self) -> None:
        """Use a new certificate at once, or its faults would show when nobody is there to see."""
        idle = self.state is State.IDLE and self._room_at_s is None
        if not self._papers.has_other_certificate or self._relink is None or not idle:
            return
        self._papers.has_other_certificate = self._was_connected = False
        self._handle([ev.LinkDown()])
        self._link = self._relink(self._link, self.identity)
        self._nameplate.wiped()
        self._link.subscribe(self._asking_for)

    def _work(self, event: LinkEvent | None) -> None:
        happened: list[ev.Event] = [ev.Tick(self._clock()), *self._look_at_rules()]
        if event is not None:
            happened += self._understand(event)
        happened += self._bench.background.finished()
        self._handle(happened)
        self._handle([ev.Room(self._link.room())])

    def _look_at_rules(self) -> list[ev.Event]:
        found = self._permission.look(self._participant.samples or None)
        if found is None:
            return []
        if found.against and self.state is State.IDLE:
            self._bench.stop(found.against)  # a model that is being made personal
        return [found]

    def _no_room(self, error: DiskFullError) -> None:
        """A step could not be written down: stand as after a power cut, until there is room."""
        if self._room_at_s is None:
            log.error("%s", error)
        self._room_at_s = self._clock() + _ROOM_S
        self._stop("the disk is full")
        self._participant = self._as_after_a_power_cut()
        self._participant.detail = str(error)
        self._participant.step(ev.Tick(self._clock()))
        limits = self._link.limits
        self._participant.step(ev.LinkUp(limits.packet_bytes_max, limits.inflight_max))
        self._participant.step(self._permission.present)

    def _look_for_room(self) -> None:
        """Take part again once there is: what was retained is sent to us again."""
        if self._room_at_s is None or self._clock() < self._room_at_s:
            return
        self._journal.remember(self._participant.memory)
        log.info("the disk has room again")
        self._room_at_s, self._participant.detail = None, ""
        self.begin()

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
            case Connected(limits, resumed):
                log.info("connected to the broker")
                self._nameplate.wiped()
                before, self._was_connected = self._was_connected, True
                if resumed and before:
                    # The broker may have been started again from an old copy of its state,
                    # and know our session with other filters than we have now.
                    self._link.subscribe(self._asking_for)
                return [ev.LinkUp(limits.packet_bytes_max, limits.inflight_max)]
            case Disconnected(reason):
                log.warning("connection lost: %s", reason)
                return [ev.LinkDown()]
            case Message() if self._room_at_s is not None:
                return []  # nothing is begun that could not be written down
            case Message():
                try:
                    return self._read(event)
                except PeerError as error:
                    self._reject(error, f"a message on {event.topic}")
        return []

    def _read(self, message: Message) -> list[ev.Event]:
        device = self.identity.device
        match self._topics.parse(message.topic):
            case "round" if message.payload:
                return [hearing.announcement(self.identity, message.payload)]
            case "identity" if message.payload:
                if self._papers.hear_server(message.payload):
                    self._link.subscribe([self._topics.round])  # they may have signed it again
            case DownTopic(to, "cfg") if to == device:
                return self._papers.hear(message.payload)
            case ("task" | "model") as kind if message.payload:
                return self._collect(kind, message.payload)
            case DownTopic(to, kind) if to == device and kind in hearing.ANSWERS:
                return [self._hear_answer(kind, message.payload)]
        return []

    def _hear_answer(self, kind: str, signed: bytes) -> ev.Answered:
        answer = hearing.answer(self.identity, kind, signed)
        if isinstance(answer, Go):
            self._shard = answer.shard
        if isinstance(answer, Ack):
            log.info("round %d: update %s %s", answer.round, answer.upload.hex(), answer.status)
        return ev.Answered(answer)

    def _collect(self, kind: Literal["task", "model"], chunk: bytes) -> list[ev.Event]:
        match self._collecting.take(self._link, kind, chunk):
            case Collected(blob=blob, content=content):
                return self._fetched(kind, blob, content)
            case "more":
                return [ev.Fetching()]
        return []

    def _stop(self, reason: str) -> None:
        self._collecting.stop(self._link, "task", "model")
        self._bench.stop(reason)

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
                return self._bench.train(number, settings)
            case ev.Evaluate(version):
                return self._bench.evaluate(self._participant.round, version)
            case ev.Keep(version, number):
                self._own_models.keep(version, number, at_rest=self.state is State.IDLE)
            case ev.Seal():
                return self._seal(effect)
            case ev.Discard():
                self._outbox.discard()
            case ev.Renew(keys, attempt):
                self._publish("renew", self._papers.question(keys=keys, attempt=attempt))
            case ev.Stop(reason):
                self._stop(reason)
        return []

    def _send(self, message: ev.Outgoing) -> None:
        kind = {"Join": "join", "Init": "init", "NeedBlob": "need", "Report": "report"}[
            type(message).__name__
        ]
        if isinstance(message, NeedBlob):
            # After a silence only: each time, the broker sends all of it again.
            self._collecting.ask(self._link, message.kind)
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
        if kind == "model" and self._bench.has_model(blob.digest):
            return [ev.Fetched("model", blob.digest)]
        stored = self._bench.stored_task(blob.digest) if kind == "task" else None
        if stored is not None:
            return self._fetched(kind, blob, stored)
        keys = self.identity.fleet_keys
        fleet_key = keys.get(self._participant.fleet_epoch, self.identity.fleet_key)
        try:
            self._collecting.begin(kind, blob, fleet_key=fleet_key)
        except PeerError as error:
            return [ev.Failed(self._participant.round, str(error))]
        if kind == "model":
            self._bench.expect_model()
        self._collecting.ask(self._link, kind)
        return []

    def _fetched(self, kind: str, blob: Blob, content: bytes) -> list[ev.Event]:
        """Take in a task or model whose digest is the announced one."""
        try:
            if kind == "task":
                self._bench.use_task(content)
                self._participant.samples = self._bench.samples
                return [ev.Fetched("task", blob.digest)]
            self._bench.use_model(blob.digest, content)
            return [ev.Fetched("model", blob.digest)]
        except NotLoadedError:
            return []  # the round is taken up again when the device is back
        except (PeerError, LocalError) as error:
            # Signed by our server and still unusable here: say so, sit this round out.
            log.error("cannot use the announced %s: %s", kind, error)
            return [ev.Failed(self._participant.round, str(error))]

    # ── sealing ─────────────────────────────────────────────────────────────────────────

    def _seal(self, wanted: ev.Seal) -> list[ev.Event]:
        number = wanted.announcement.round
        taken = self._bench.take_update(wanted.announcement.delta_bound)
        if taken is None:
            return [ev.Failed(number, "there is nothing to send")]
        self._participant.samples = self._bench.samples  # they may have been fetched anew
        init, update = sealed(self.identity, wanted, *taken, random=self._random)
        try:
            self._outbox.put(init, update)
        except LocalError as error:
            return [ev.Failed(number, str(error))]
        return [ev.Sealed(init)]
