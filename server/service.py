"""The server's loop: receive, step, perform. It holds no rules about rounds.

One thread owns the link, the ledger and the coordinator. What a message says is
believed only after its signature was verified, here. Whatever arrives, the loop goes
on: a message that is wrong is dropped and counted by reason.
"""

import logging
import queue
import time
from collections.abc import Callable, Iterable

from broker_bridge.disk import DiskFullError
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.link.base import Connected, Disconnected, Link, LinkEvent, Message
from broker_bridge.wire import messages
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.messages import (
    Busy,
    Command,
    Go,
    Init,
    Join,
    Need,
    NeedBlob,
    Presence,
    Reply,
    Report,
    RoundSummary,
)
from broker_bridge.wire.topics import DeviceState, Topics, UpTopic
from server import events as ev
from server.coordinator import Coordinator
from server.evaluation import Evaluator
from server.fleet.enrolment import Registrar
from server.fleet.keys import ServerKeys
from server.fleet.renewal import Renewals
from server.ledger import Ledger
from server.members import Members, check_member
from server.noticeboard import Noticeboard
from server.quotas import Quotas
from server.rejects import Rejects
from server.store import rows

__all__ = ["Service"]

log = logging.getLogger("midge.server")

_BUSY = "the server has no room for updates now"
_COMMIT_MAX = 256  # updates that share one fsync
_TAKEN_MAX = 256  # messages before we look at the time again
_ROOM_S = 1.0  # how often to look whether the disk has room
_KEYS_S = 1.0  # how often to look whether a command changed the keys
_SWEEP_S = 600.0  # how often to look for members that should renew
_WRITES = (
    ev.OpenRound, ev.CloseRound, ev.AbandonRound, ev.Publish, ev.MarkPaused, ev.EndRun, ev.Refuse,
    ev.Withdraw,
)  # fmt: skip
_UP = {"join": Join, "init": Init, "need": NeedBlob, "report": Report}


class Service:
    """One federation's server at work."""

    def __init__(
        self,
        link: Link,
        ledger: Ledger,
        coordinator: Coordinator,
        registrar: Registrar,
        *,
        evaluation_npz: str = "",
        quotas: Quotas | None = None,
        shard: int = 0,
        clock: Callable[[], float] = time.monotonic,
        on_summary: Callable[[RoundSummary], None] = lambda _: None,
    ) -> None:
        self._link = link
        self._ledger = ledger
        self._coordinator = coordinator
        self._registrar = registrar
        self._renewals = Renewals(registrar)
        self._keys_at_s = self._sweep_at_s = clock()
        self._evaluation_npz = evaluation_npz
        self._quotas = quotas or Quotas()
        self._shard = shard
        self._clock = clock
        self._on_summary = on_summary
        self._topics = Topics(coordinator.federation)
        self._board = Noticeboard(
            link, ledger, self._topics, open_round=lambda: coordinator.announcement, clock=clock
        )
        self._evaluator: Evaluator | None = None
        self._to_accept: list[ev.Accept] = []
        self._receipts: list[ev.Acknowledge] = []  # that are signed together
        self._results: queue.SimpleQueue[ev.Event] = queue.SimpleQueue()
        self._members = Members(ledger.db, registrar.home, clock=clock)
        self._rejects = Rejects(coordinator.rejects, ledger, clock=clock)
        self._sign = ledger.keys.sign  # made once: it takes as long as a signature
        self._trouble = ""  # with the disk
        self._look_again_s = 0.0
        self._postponed: list[ev.Effect] = []  # what is to be written down once there is room

    # ── the loop ────────────────────────────────────────────────────────────────────────

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped` says so. Raises LocalError, LinkError."""
        self.begin()
        while not stopped():
            self.turn(self._link.receive(timeout_s=0.25))
        if not self._trouble:
            self._rejects.keep()
        self._board.show_presence("offline")

    def begin(self) -> None:
        """Take up what was open, and listen."""
        self._fit(self._link.limits.packet_bytes_max)
        self._members.begin()
        self._rejects.restore()
        self._restore()
        self._link.subscribe([self._topics.all_states, *self._asking_for])

    @property
    def _asking_for(self) -> list[str]:
        return [self._topics.ctl, self._topics.all_up(self._shard)]

    def turn(self, event: LinkEvent | None) -> None:
        """One turn: what came over the link, what was measured, and the time."""
        self._look_for_room()
        self._look_at_fleet()
        self._look_at_keys()
        if not self._trouble:
            self._rejects.keep_now_and_then()
        if not self._postponed:
            self._handle([ev.Tick(self._clock())])
        with self._link.together():
            self._take_all(event)
            while not self._results.empty():
                self._handle([self._results.get()])
            self._accept()

    def _take_all(self, event: LinkEvent | None) -> None:
        """Take what is already here before committing: many updates share one fsync."""
        taken = 0
        while event is not None:
            self._take(event)
            taken += 1
            event = self._link.receive(timeout_s=0) if taken < _TAKEN_MAX else None

    def _take(self, event: LinkEvent) -> None:
        match event:
            case Message():
                try:
                    self._handle(self._understand(event))
                except PeerError as error:
                    self._rejects.count(error, event.topic)
                except DiskFullError as error:
                    self._no_room(error)  # whoever asked will ask again
                self._link.ack(event)
                if len(self._to_accept) >= _COMMIT_MAX:
                    self._accept()
            case Connected(limits, resumed):
                log.info("connected to the broker")
                self._fit(limits.packet_bytes_max)
                # A broker may be one that was started again from an old copy of its state: it
                # says "resumed", and knows neither our latest words nor our last filters.
                known = resumed and self._board.is_laid_out
                if known:
                    self._link.subscribe(self._asking_for)
                self._board.lay_out(blobs_too=not known)
                self._handle([ev.LinkUp(resumed)])
            case Disconnected(reason):
                log.warning("connection lost: %s", reason)
                self._handle([ev.LinkDown()])

    def _handle(self, happened: list[ev.Event]) -> None:
        """Step through what happened, and what comes of that."""
        for event in happened:  # which grows meanwhile
            happened += self._carry_out(self._coordinator.step(event))
        self._give_receipts()

    def _carry_out(self, effects: Iterable[ev.Effect]) -> list[ev.Event]:
        happened: list[ev.Event] = []
        for effect in effects:
            if isinstance(effect, ev.Acknowledge):
                self._receipts.append(effect)
                continue
            self._give_receipts()  # what is said or done next comes after them
            if self._postponed and isinstance(effect, _WRITES):
                self._postponed.append(effect)  # in the order in which they were decided
                continue
            try:
                happened += self._perform(effect)
            except DiskFullError as error:
                self._no_room(error)
                self._postponed.append(effect)
        return happened

    def _accept(self) -> None:
        """Commit the complete updates that came in together, then say so."""
        while self._to_accept:
            batch, self._to_accept = self._to_accept, []
            results = self._ledger.accept(batch, at_disk=self._link.apart)
            for each in results:
                if isinstance(each, ev.Refused) and each.status == "busy":
                    self._no_room(DiskFullError(each.reason))
            self._handle([ev.Tick(self._clock()), *results])

    # ── a full disk ─────────────────────────────────────────────────────────────────────────

    def _no_room(self, error: DiskFullError) -> None:
        """Say so, take nothing new, and keep what was promised."""
        if not self._trouble:
            log.error("%s", error)
        self._trouble, self._look_again_s = str(error), self._clock() + _ROOM_S
        self._coordinator.step(ev.Room(self._trouble))

    def _look_for_room(self) -> None:
        if self._clock() < self._look_again_s:
            return
        self._look_again_s = self._clock() + _ROOM_S
        try:
            self._ledger.check_room()
        except DiskFullError as error:
            self._no_room(error)
            return
        again, self._postponed = self._postponed, []
        self._handle(self._carry_out(again))
        if self._trouble and not self._postponed:
            log.info("the disk has room again")
            self._trouble = ""
            self._coordinator.step(ev.Room())

    # ── who belongs to the fleet ────────────────────────────────────────────────────────────

    def _look_at_fleet(self, *, now: bool = False) -> None:
        """Whether a command changed who belongs to it; once a second, or `now`."""
        try:
            change = self._members.look(now=now)
        except LocalError as error:
            log.error("%s (going on with the members of before)", error)
            return
        if change is None:
            return
        self._sweep_at_s = self._clock()  # somebody may be wanted to renew
        self._accept()  # what is complete is in the sum before anything is taken out of it
        for name, status in change.shut_out.items():
            self._shut(name, revoked=status != "suspended")
        if change.is_anyone_back:  # what they said while they were out was not heard
            self._link.subscribe([self._topics.all_states])

    def _shut(self, device: str, *, revoked: bool) -> None:
        log.info("%s is %s", device, "revoked" if revoked else "suspended")
        if revoked and self._coordinator.knows(device):
            self._board.publish(self._topics.state(device), b"", retain=True)
        self._handle([ev.ShutOut(device, revoked)])

    # ── keys ────────────────────────────────────────────────────────────────────────────────

    def _look_at_keys(self) -> None:
        """Whether a command changed them; and now and then, who should renew his."""
        now_s = self._clock()
        if now_s >= self._keys_at_s:
            self._keys_at_s = now_s + _KEYS_S
            try:
                keys = self._registrar.home.keys()
            except LocalError as error:
                log.error("%s (going on with the keys of before)", error)
                return
            if keys != self._ledger.keys:
                self._take_keys(keys)
        if now_s >= self._sweep_at_s:
            self._sweep_at_s = now_s + _SWEEP_S
            self._ask_to_renew()

    def _take_keys(self, keys: ServerKeys) -> None:
        """Go on with other keys. An open round goes on under the fleet key it began with."""
        log.info("new keys: identity %d, fleet key %d", keys.said.sequence, keys.fleet_epoch)
        self._ledger.take_keys(keys)
        self._sign = keys.sign
        self._board.identify()
        self._board.reseal()
        if self._board.announced is not None:
            self._board.announce(self._ledger.announcer.again(self._board.announced))

    def _ask_to_renew(self) -> None:
        """Ask whoever is here and should."""
        online = {*self._coordinator.online(), *self._coordinator.online("evaluate")}
        for device in self._renewals.due():
            if device.name in online:
                self._request_renewal(device)

    def _request_renewal(self, device: rows.Device) -> None:
        online = self._coordinator.online_count()
        asked = self._renewals.request(device, now_s=self._clock(), online=online)
        if asked is not None:
            self._board.publish(self._topics.down(device.name, "cfg"), asked)

    # ── what a message says ─────────────────────────────────────────────────────────────

    def _understand(self, message: Message) -> list[ev.Event]:
        place = self._topics.parse(message.topic)
        match place:
            case UpTopic(device=device, kind="data"):
                self._quotas.chunk(device, len(message.payload))
            case UpTopic(device=device) | DeviceState(device):
                self._quotas.control(device, now_s=self._clock())
        if self._postponed and isinstance(place, UpTopic):
            raise PeerError("no_room", "nothing can be written down now")
        match place:
            case UpTopic(device=device, kind="data"):
                return self._chunk(device, message.payload)
            case "ctl":
                return self._command(message)
            case DeviceState(device):
                return self._presence(device, message.payload)
            case UpTopic(device=device, kind="enrol"):
                self._look_at_fleet(now=True)  # its name may be that of one who is to go
                answer = self._registrar.answer(device, message.payload)
                self._members.forget(device)
                self._board.publish(self._topics.down(device, "cfg"), answer)
                log.info("enrolment of %s answered", device)
                return []
            case UpTopic(device=device, kind="renew"):
                self._renew(device, message.payload)
                return []
            case UpTopic(device=device, kind=kind):
                return self._signed(device, kind, message.payload)
        return []

    def _renew(self, device: str, payload: bytes) -> None:
        self._accept()  # what is complete is summed under the keys that sealed it
        has_upload = self._ledger.has_upload_of(device)
        answer = self._renewals.answer(device, payload, has_upload=has_upload)
        self._members.forget(device)
        self._board.publish(self._topics.down(device, "cfg"), answer)
        log.debug("renewal of %s answered", device)

    def _chunk(self, device: str, chunk: bytes) -> list[ev.Event]:
        try:
            complete = self._ledger.put_chunk(device, chunk)
        except DiskFullError as error:
            self._no_room(error)
            return [ev.Refused(chunk_header(chunk).transfer, "busy", _BUSY)]
        return [] if complete is None else [ev.Complete(complete)]

    def _signed(self, device: str, kind: str, payload: bytes) -> list[ev.Event]:
        row = self._members.row(device)
        said = messages.opened(row.sign_public, kind, self._scope(device), payload, _UP[kind])
        if row.status != "enrolled" and isinstance(said, Join):  # or it would ask again and again
            reason = f"the device {device!r} is {row.status}"
            self._send(device, Busy(round=said.round, retry_after_s=-1, reason=reason))
        check_member(row)
        match said:
            case Join():
                return [ev.Joined(device, said, self._upload_ids(device))]
            case Init():
                return [ev.Inited(device, said, said.upload in self._upload_ids(device))]
            case NeedBlob():
                self._board.repeat(said)
            case Report():
                return [ev.Reported(device, said)]
        return []

    def _upload_ids(self, device: str) -> tuple[bytes, ...]:
        return self._ledger.upload_ids(device) if self._ledger.has_open_round else ()

    def _presence(self, device: str, payload: bytes) -> list[ev.Event]:
        if not payload:
            return []
        presence = messages.decode_json(payload, Presence)
        row = self._members.member(device)
        if presence.state not in ("lost", "sleeping"):
            self._request_renewal(row)
        return [ev.Seen(device, presence)]

    def _command(self, message: Message) -> list[ev.Event]:
        self._accept()  # a stop must not take the round from under what is already complete
        if message.retained:
            raise PeerError("retained_command", "a retained command would start again by itself")
        try:
            command = messages.decode_json(message.payload, Command)
        except PeerError as error:
            self._respond(Reply(ok=False, error=_how_to_command(error)))
            raise
        if command.id is not None and command.cmd != "status":
            with self._ledger.db.reading() as tx:
                answered = tx.reply_to(command.id)
            if answered is not None:
                self._board.publish(self._topics.ctl_reply, answered.encode())
                return []
        if self._postponed and command.cmd != "status":
            self._respond(Reply(ok=False, cmd=command.cmd, error=self._trouble))
            return []
        return [ev.Commanded(command)]

    # ── what is to be done ──────────────────────────────────────────────────────────────

    def _perform(self, effect: ev.Effect) -> list[ev.Event]:
        match effect:
            case ev.Send(device, message):
                self._send(device, message)
            case ev.BeginUpload(device, init):
                return self._begin_upload(device, init)
            case ev.Accept():
                self._to_accept.append(effect)
            case ev.Refuse(device, upload, reason):
                self._ledger.refuse(device, upload, reason)
            case ev.Forget(upload):
                self._ledger.forget(upload)
            case ev.Withdraw(device, reason):
                self._ledger.withdraw(device, reason)
            case ev.Respond(reply):
                self._respond(self._as_written(reply))
            case ev.StartRun(command, run):
                return self._start_run(command, run)
            case ev.OpenRound():
                return self._open_round(effect)
            case ev.CloseRound(summary):
                return self._close_round(summary)
            case ev.AbandonRound(summary):
                signed = self._ledger.abandon_round(summary)
                self._board.reseal()
                self._board.announce(signed)
            case ev.Evaluate(version):
                self._evaluate(version)
            case ev.Publish(summary):
                self._publish_summary(summary)
            case ev.MarkPaused(run, paused):
                self._ledger.mark_paused(run.id, paused)
            case ev.EndRun(run, status, reason):
                log.info("run %d %s: %s", run.id, status, reason)
                self._ledger.end_run(run.id, status, reason)
        return []

    def _send(self, device: str, message: Go | Busy | Need) -> None:
        kind = "need" if isinstance(message, Need) else "go"
        signed = messages.signed(self._sign, kind, self._scope(device), message)
        self._board.publish(self._topics.down(device, kind), signed)

    def _give_receipts(self) -> None:
        """Say those that came about together, under one signature (decision 0136)."""
        if not self._receipts:
            return
        receipts, self._receipts = self._receipts, []
        said = [(self._scope(each.device), each.ack) for each in receipts]
        signed = messages.signed_together(self._sign, "ack", said)
        for receipt, data in zip(receipts, signed, strict=True):
            self._board.publish(self._topics.down(receipt.device, "ack"), data)

    def _scope(self, device: str) -> str:
        return f"{self._coordinator.federation}/{device}"

    def _begin_upload(self, device: str, init: Init) -> list[ev.Event]:
        try:
            missing = self._ledger.begin_upload(self._members.member(device), init)
        except DiskFullError as error:
            log.warning("cannot take an upload: %s", error)
            return [ev.Refused(init.upload, "busy", _BUSY)]
        except LocalError as error:
            log.error("cannot take an upload: %s", error)
            return []  # the device asks again after a silence
        except PeerError as error:
            return [ev.Refused(init.upload, "rejected", f"{error.reason}: {error}")]
        return [ev.Begun(init.upload, missing)]

    def _start_run(self, command: Command, run: ev.Run) -> list[ev.Event]:
        try:
            started = self._ledger.start(run)
            self._evaluator = self._make_evaluator()
        except LocalError as error:
            self._respond(Reply(ok=False, cmd="start", id=command.id, error=str(error)))
            return []
        log.info("run %d of task %s started", started.id, started.task)
        self._respond(Reply(ok=True, cmd="start", id=command.id, status={"run": started.id}))
        self._board.retain("task", "model")
        return [ev.Started(started)]

    def _make_evaluator(self) -> Evaluator | None:
        if not self._evaluation_npz or self._ledger.task is None:
            return None
        return Evaluator(self._ledger.task.plan, self._evaluation_npz)

    def _open_round(self, effect: ev.OpenRound) -> list[ev.Event]:
        opened, signed = self._ledger.open_round(effect)
        self._quotas.begin_round(opened.update_bytes)
        log.info("round %d is open for %d updates", opened.announcement.round, effect.target)
        self._board.announce(signed)
        return [opened]

    def _close_round(self, summary: RoundSummary) -> list[ev.Event]:
        gone = self._ledger.gone_devices()
        if gone:  # since we looked last: then it is decided again without them
            return [ev.ShutOut(device, revoked=True) for device in gone]
        version, signed = self._ledger.close_round(summary)
        self._board.retain("model")
        self._board.reseal()
        self._board.announce(signed)
        return [ev.Tick(self._clock()), ev.Closed(version, self._evaluator is not None)]

    def _evaluate(self, version: int) -> None:
        assert self._evaluator is not None  # noqa: S101 - asked only of a server that has one

        def done(found: ev.Evaluated) -> None:
            self._results.put(found)
            self._link.wake()

        self._evaluator.start(version, self._ledger.model, done)

    def _publish_summary(self, summary: RoundSummary) -> None:
        log.info(
            "round %d %s: %d updates, model %d %s %s",
            summary.round, summary.state, summary.accepted, summary.model_version,
            summary.evaluation or "", summary.reason,
        )  # fmt: skip
        if summary.evaluation:
            self._ledger.measured(summary)
        self._board.summarise(messages.encode_json(summary))
        self._on_summary(summary)

    def _respond(self, reply: Reply) -> None:
        if reply.status is not None:
            reply = Reply(
                ok=reply.ok, cmd=reply.cmd, id=reply.id, error=reply.error,
                status=reply.status | {"model_version": self._ledger.model_version},
            )  # fmt: skip
        if reply.cmd and reply.error:  # whoever used mosquitto_pub does not hear the answer
            log.warning("%s: %s", reply.cmd, reply.error)
        data = messages.encode_json(reply)
        if reply.id is not None and reply.cmd != "status":
            try:
                with self._ledger.db.transaction() as tx:
                    tx.remember_reply(reply.id, data.decode())
            except DiskFullError as error:
                self._no_room(error)  # answered, and carried out again if it is asked again
        self._board.publish(self._topics.ctl_reply, data)

    def _as_written(self, reply: Reply) -> Reply:
        """The answer to a command; no yes to what a restart would undo, for want of room."""
        if not self._postponed or not reply.ok or reply.cmd == "status":
            return reply
        undone = f"{self._trouble}. Until then a restart would undo this {reply.cmd}"
        return Reply(ok=False, cmd=reply.cmd, id=reply.id, error=undone)

    def _fit(self, packet_bytes_max: int) -> None:
        self._ledger.announcer.packet_bytes = min(LIMITS.packet_bytes_max, packet_bytes_max)

    # ── coming back ─────────────────────────────────────────────────────────────────────

    def _restore(self) -> None:
        found = self._ledger.restore()
        recalled = self._ledger.recall()
        if recalled is not None:
            self._board.announced = recalled.signed
            self._board.summary = messages.encode_json(recalled.summary)
        if found is None:
            return
        log.info("going on with run %d of task %s", found.run.id, found.run.task)
        self._evaluator = self._make_evaluator()
        if found.opened is not None:
            self._quotas.begin_round(found.opened.update_bytes)
            self._board.announced = found.signed  # retained with all the rest once connected
        effects = self._coordinator.restore(
            found.run, found.opened, found.uploads, now_s=self._clock(),
            elapsed_s=found.elapsed_s, paused=found.paused, last=found.last,
            server_evaluates=self._evaluator is not None,
        )  # fmt: skip
        self._handle(self._carry_out(effects))


def _how_to_command(error: PeerError) -> str:
    return (
        f"not a command ({error}); send JSON such as "
        '{"cmd":"start","task":"wearables","rounds":10}, or cmd stop, pause, resume, status'
    )
