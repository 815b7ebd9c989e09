"""The server's loop: receive, step, perform. It holds no rules about rounds.

One thread owns the link, the ledger and the coordinator. A message is heard (hearing.py) and
becomes events; the coordinator says what is to be done, and it is done here. Whatever arrives, the
loop goes on: a message that is wrong is dropped and counted by reason.
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
from broker_bridge.wire.messages import Command, Init, Reply, RoundSummary
from broker_bridge.wire.topics import Topics
from server import events as ev
from server.coordinator import Coordinator
from server.desk import Desk
from server.evaluation import Evaluator
from server.fleet.enrolment import Registrar
from server.fleet.renewal import Renewals
from server.hearing import BUSY, Hearing
from server.ledger import Ledger
from server.lookout import Lookout
from server.mail import Mail
from server.members import Members
from server.noticeboard import Noticeboard
from server.quotas import Quotas
from server.rejects import Rejects
from server.room import Room

__all__ = ["Service"]

log = logging.getLogger("midge.server")

_COMMIT_MAX = 256  # updates that share one fsync
_TAKEN_MAX = 256  # messages before we look at the time again
_WRITES = (
    ev.OpenRound, ev.CloseRound, ev.AbandonRound, ev.Publish, ev.MarkPaused, ev.EndRun, ev.Refuse,
    ev.Withdraw,
)  # fmt: skip


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
        self._evaluation_npz = evaluation_npz
        self._evaluator: Evaluator | None = None
        self._quotas = quotas or Quotas()
        self._shard = shard
        self._clock = clock
        self._on_summary = on_summary
        self._topics = topics = Topics(coordinator.federation)
        self._to_accept: list[ev.Accept] = []
        self._results: queue.SimpleQueue[ev.Event] = queue.SimpleQueue()
        self._members = Members(ledger.db, registrar.home, clock=clock)
        self._rejects = Rejects(coordinator.rejects, ledger, clock=clock)
        self._room = Room(ledger, coordinator, clock=clock)
        self._board = Noticeboard(
            link, ledger, topics, open_round=lambda: coordinator.announcement, clock=clock
        )
        self._mail = Mail(ledger, self._board, topics)
        self._desk = Desk(ledger, self._board, self._room, topics)
        self._renewals = Renewals(registrar)
        self._lookout = Lookout(
            registrar.home, ledger, self._members, self._renewals, coordinator,
            board=self._board, mail=self._mail, topics=topics, clock=clock,
        )  # fmt: skip
        self._hearing = Hearing(
            ledger=ledger, members=self._members, registrar=registrar, renewals=self._renewals,
            lookout=self._lookout, quotas=self._quotas, desk=self._desk, room=self._room,
            board=self._board, mail=self._mail, topics=topics, clock=clock,
            accept=self._accept, look_at_fleet=lambda: self._look_at_fleet(now=True),
        )  # fmt: skip

    # ── the loop ────────────────────────────────────────────────────────────────────────

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until `stopped` says so. Raises LocalError, LinkError."""
        self.begin()
        while not stopped():
            self.turn(self._link.receive(timeout_s=0.25))
        if not self._room.trouble:
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
        self._lookout.look_at_keys()
        if not self._room.trouble:
            self._rejects.keep_now_and_then()
        if not self._room.postponed:
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
                    self._handle(self._hearing.understand(event))
                except PeerError as error:
                    self._rejects.count(error, event.topic)
                except DiskFullError as error:
                    self._room.none(error)  # whoever asked will ask again
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
        self._mail.give_receipts()

    def _carry_out(self, effects: Iterable[ev.Effect]) -> list[ev.Event]:
        happened: list[ev.Event] = []
        for effect in effects:
            if isinstance(effect, ev.Acknowledge):
                self._mail.receipts.append(effect)
                continue
            self._mail.give_receipts()  # what is said or done next comes after them
            if self._room.postponed and isinstance(effect, _WRITES):
                self._room.postponed.append(effect)
                continue
            try:
                happened += self._perform(effect)
            except DiskFullError as error:
                self._room.none(error)
                self._room.postponed.append(effect)
        return happened

    def _accept(self) -> None:
        """Commit the complete updates that came in together, then say so."""
        while self._to_accept:
            batch, self._to_accept = self._to_accept, []
            results = self._ledger.accept(batch, at_disk=self._link.apart)
            for each in results:
                if isinstance(each, ev.Refused) and each.status == "busy":
                    self._room.none(DiskFullError(each.reason))
            self._handle([ev.Tick(self._clock()), *results])

    # ── what changes by itself ──────────────────────────────────────────────────────────────

    def _look_for_room(self) -> None:
        if self._room.is_found():
            self._handle(self._carry_out(self._room.take_postponed()))
            self._room.made_up()

    def _look_at_fleet(self, *, now: bool = False) -> None:
        """Whether a command changed who belongs to it; once a second, or `now`."""
        change = self._lookout.look_at_members(now=now)
        if change is None:
            return
        self._accept()  # what is complete is in the sum before anything is taken out of it
        for name, status in change.shut_out.items():
            self._handle([self._lookout.shut(name, revoked=status != "suspended")])
        if change.is_anyone_back:  # what they said while they were out was not heard
            self._link.subscribe([self._topics.all_states])

    # ── what is to be done ──────────────────────────────────────────────────────────────

    def _perform(self, effect: ev.Effect) -> list[ev.Event]:
        match effect:
            case ev.Send(device, message):
                self._mail.send(device, message)
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
                self._desk.answer(reply)
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

    def _begin_upload(self, device: str, init: Init) -> list[ev.Event]:
        try:
            missing = self._ledger.begin_upload(self._members.member(device), init)
        except DiskFullError as error:
            log.warning("cannot take an upload: %s", error)
            return [ev.Refused(init.upload, "busy", BUSY)]
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
            self._desk.answer(Reply(ok=False, cmd="start", id=command.id, error=str(error)))
            return []
        log.info("run %d of task %s started", started.id, started.task)
        self._desk.answer(Reply(ok=True, cmd="start", id=command.id, status={"run": started.id}))
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
