"""A run, seen from the server: the rules, and nothing but the rules.

Events go in, effects come out. Time comes in with each event. What arrives from
devices has already been verified by the service, so a forged message never becomes an
event; what is stale, repeated, unasked for or out of turn is answered or refused here.

A run is what an operator started: some number of rounds, or until the model is good.

    IDLE ─ start ─► GATHERING ─ enough devices online ─► OPENING ─ announced ─► OPEN
      ─ target reached, or deadline with quorum ─► CLOSING ─ new model on disk ─►
      EVALUATING ─ measured ─► GATHERING … or IDLE when the run is over

A receipt is an effect that follows the event `Accepted`, which the service sends only
when the update is on disk: no device hears `accepted` for what a crash could lose.
"""

from collections import Counter
from dataclasses import replace
from enum import Enum
from typing import Literal

import msgspec

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.messages import Ack, Announcement, Busy, Command, Report, RoundSummary
from server.attendance import Attendance
from server.events import (
    AbandonRound,
    Accepted,
    Acknowledge,
    Begun,
    Closed,
    CloseRound,
    Commanded,
    Complete,
    Effect,
    EndRun,
    Evaluate,
    Evaluated,
    Event,
    Inited,
    Joined,
    LinkDown,
    LinkUp,
    MarkPaused,
    Opened,
    OpenRound,
    Publish,
    Refused,
    Reported,
    Room,
    Rules,
    Run,
    Seen,
    Send,
    ShutOut,
    Started,
    StartRun,
    Tick,
    Unread,
    Upload,
)
from server.measuring import Measured, Measuring, good_enough
from server.orders import answer, ordered_run, out_of_turn, refusal
from server.round import Round

__all__ = ["Coordinator", "Phase"]

_NOBODY = Measured({})  # measured it


class Phase(Enum):
    """Where the run is."""

    IDLE = "idle"
    GATHERING = "gathering"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    EVALUATING = "evaluating"


class Coordinator:
    """One federation's rounds, one run at a time."""

    def __init__(self, *, federation: str, rules: Rules) -> None:
        self.federation = federation
        self.rules = rules
        self.phase = Phase.IDLE
        self.run: Run | None = None
        self.paused = False
        self.detail = "waiting for a start"
        self.last: RoundSummary | None = None
        self.rejects: Counter[str] = Counter()
        self._attendance = Attendance()
        self._now_s = 0.0
        self._round: Round | None = None
        self._measuring: Measuring | None = None  # the newest model
        self._trainers: set[str] = set()  # devices that joined in this run
        self._weight_max = LIMITS.examples_max
        self._connected = True
        self._trouble = ""  # with the disk
        self._unread = ""  # what cannot be read of the fleet's files

    # ── what others may ask ─────────────────────────────────────────────────────────────

    @property
    def announcement(self) -> Announcement | None:
        """The open round's announcement."""
        return None if self._round is None else self._round.announcement

    def upload(self, upload: bytes) -> Upload | None:
        """An upload of the open round."""
        return None if self._round is None else self._round.upload(upload)

    def knows(self, device: str) -> bool:
        """Whether this device's presence was heard."""
        return self._attendance.knows(device)

    def online(self, role: str = "train") -> list[str]:
        """The devices of this role that are here."""
        return self._attendance.online(role)

    def online_count(self, role: str = "train") -> int:
        """How many devices of this role are here; cheap, however large the fleet."""
        return self._attendance.count(role)

    def status(self) -> dict[str, object]:
        """Everything an operator may want to know, as JSON types."""
        found: dict[str, object] = {
            "federation": self.federation,
            "phase": "paused" if self.paused else self.phase.value,
            "detail": "; ".join(filter(None, (self._trouble, self._unread))) or self.detail,
            "devices": {
                "online": self.online_count(),
                "evaluating": self.online_count("evaluate"),
            }
            | self._attendance.states(),
            "rejected": dict(self.rejects),
        }
        if self.run is not None:
            found["run"] = {
                "id": self.run.id,
                "task": self.run.task,
                "rounds": self.run.rounds,
                "rounds_done": self.run.rounds_done,
            }
        if self._round is not None:
            found["round"] = self._round.status(self._now_s)
        return found

    # ── coming back after a crash ───────────────────────────────────────────────────────

    def restore(
        self,
        run: Run,
        opened: Opened | None,
        uploads: list[Upload],
        *,
        now_s: float,
        elapsed_s: float = 0.0,
        paused: bool = False,
        last: RoundSummary | None = None,
        server_evaluates: bool = False,
    ) -> list[Effect]:
        """Take up a run that was open when the server died, and say what to do.

        `opened` is its open round, if it had one; if not, `last` is its newest round, if
        that one made a model.
        """
        self.run, self._now_s, self.paused = run, now_s, paused
        self.phase, self.detail = Phase.GATHERING, "going on after a restart"
        if opened is None and run.abandoned_in_a_row >= self.rules.abandoned_max:
            return self._give_up("the last of them as the server died")
        if opened is None:
            return [] if last is None else self._take_up_measuring(last, server_evaluates)
        self._begin(opened)
        assert self._round is not None  # noqa: S101 - _begin made it
        self._round.opened_s = now_s - min(elapsed_s, opened.announcement.deadline_s)
        for upload in uploads:
            self._round.joined.add(upload.device)
            self._trainers.add(upload.device)
            self._round.put(upload)
        return self._close_if_reached(self._round)  # the last receipt may have been the last act

    def _take_up_measuring(self, last: RoundSummary, server_evaluates: bool) -> list[Effect]:
        """The server died between a new model and the decision whether it is good enough."""
        self.last = last
        self._begin_measuring(last.model_version, by_server=server_evaluates)
        if last.evaluation:
            found = Measured(last.evaluation, last.evaluation_examples, last.evaluated_by)
            return self._decide(found)
        return [Evaluate(last.model_version)] if server_evaluates else []

    # ── one step ────────────────────────────────────────────────────────────────────────

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do.

        Raises PeerError for what a peer should not have sent; nothing has changed then.
        """
        match event:
            # First, for these come by the thousand.
            case Complete() | Accepted() | Begun() | Refused():
                return self._progressed(event)
            case Tick(now_s):
                self._now_s = max(self._now_s, now_s)
                return self._tick()
            case LinkDown():
                self._connected = False
                return []
            case LinkUp(resumed):
                self._connected = True
                if not resumed:
                    self._attendance.clear()  # whoever is there will say so again
                return []
            case Room(trouble):
                self._trouble = trouble
                return []
            case Unread(trouble):
                self._unread = trouble  # nothing waits for that: rounds go on
                return []
            case Commanded(command):
                return self._commanded(command)
            case Started(run):
                return self._started(run)
            case Seen(device, presence):
                self._attendance.seen(device, presence)
                return []
            case ShutOut():
                return self._shut_out(event)
            case Opened():
                if self.phase is Phase.OPENING:
                    self._begin(event)
                return []
            case Joined():
                return self._joined(event)
            case Inited():
                return self._inited(event)
            case Closed(version, server_evaluates):
                return self._closed(version, server_evaluates)
            case Evaluated(version, examples, metrics):
                return self._measured(version, Measured(metrics, examples, "server"))
            case Reported(device, report):
                return self._reported(device, report)

    # ── the operator ────────────────────────────────────────────────────────────────────

    def _commanded(self, command: Command) -> list[Effect]:
        if (why := out_of_turn(command, self.run)) is not None:
            return [refusal(command, why)]
        match command.cmd:
            case "start":
                found = ordered_run(command, self.rules)
                if isinstance(found, Run):
                    return [StartRun(command, found)]
                return [refusal(command, found)]
            case "stop":
                effects = self._stop()
            case "pause" | "resume":
                effects = self._pause(command.cmd == "pause")
            case "status":
                effects = []
        return [*effects, answer(command, status=self.status())]

    def _started(self, run: Run) -> list[Effect]:
        if self.run is not None:
            return []
        self.run, self.phase, self.paused = run, Phase.GATHERING, False
        self.detail = "waiting for devices"
        self._trainers.clear()
        return self._tick()

    def _pause(self, paused: bool) -> list[Effect]:
        if self.run is None:
            return []
        self.paused = paused
        return [MarkPaused(self.run, paused)]

    def _stop(self) -> list[Effect]:
        why = "stopped by the operator"
        effects = [] if self._round is None else self._abandon(why, counts=False)
        return effects + self._end("stopped", why)

    def _end(self, status: Literal["done", "stopped", "failed"], reason: str) -> list[Effect]:
        run = self.run
        if run is None:
            return []
        self.run, self.phase, self.paused = None, Phase.IDLE, False
        self.detail = f"run {run.id} {status}: {reason}"
        return [EndRun(run, status, reason)]

    # ── time ────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> list[Effect]:
        if self.phase is Phase.GATHERING:
            return self._gather()
        if self._round and self.phase is Phase.OPEN and self._now_s >= self._round.over_s:
            return self._deadline()
        if self._measuring and self.phase is Phase.EVALUATING:
            over = self._measuring.is_over(self._now_s, evaluators=self.online_count("evaluate"))
            return self._decide(_NOBODY) if over else []
        return []

    def _gather(self) -> list[Effect]:
        run = self.run
        if run is None or self.paused:
            return []
        if self._trouble:
            return []  # nothing is begun that could not be finished
        if not self._connected:
            self.detail = "waiting for the broker"  # a round that nobody hears of would be lost
            return []
        online = self.online_count()
        target = run.target or online
        quorum = run.quorum or max(1, -(-target // 2))
        if online < quorum:
            self.detail = f"waiting for devices: {online} of at least {quorum} online"
            return []
        self.phase = Phase.OPENING
        return [OpenRound(run, target, quorum, online)]

    def _begin(self, opened: Opened) -> None:
        self.phase, self.detail = Phase.OPEN, f"round {opened.announcement.round} is open"
        self._weight_max = opened.announcement.weight_max
        self._round = Round(
            opened,
            self.rules,
            now_s=self._now_s,
            rejects=self.rejects,
            is_lost=self._attendance.is_lost,
        )

    def _deadline(self) -> list[Effect]:
        assert self._round is not None  # noqa: S101 - OPEN implies it
        if self._round.count("accepting"):
            return []  # an update is between disk and sum: its answer comes in this same turn
        accepted = self._round.count("accepted")
        if accepted >= self._round.quorum:
            return self._close()
        return self._abandon(
            f"{accepted} updates at the deadline, {self._round.quorum} were needed"
        )

    # ── devices ─────────────────────────────────────────────────────────────────────────

    def _current(self, number: int, digest: bytes) -> Round:
        """The open round, if this is it. Raises PeerError."""
        if self._round is None or self.phase is not Phase.OPEN:
            raise PeerError("no_open_round", f"round {number} is not open")
        if number != self._round.announcement.round:
            raise PeerError("other_round", f"round {number} is not the open one")
        if digest != self._round.digest:
            raise PeerError("other_announcement", "a message for another announcement")
        return self._round

    def _joined(self, event: Joined) -> list[Effect]:
        device, join = event.device, event.join
        try:
            this = self._current(join.round, join.announcement)
        except PeerError as error:
            return [Send(device, Busy(round=join.round, retry_after_s=-1, reason=str(error)))]
        self._trainers.add(device)
        return this.joined_by(event, now_s=self._now_s, room=not self._trouble)

    def _inited(self, event: Inited) -> list[Effect]:
        init = event.init
        try:
            this = self._current(init.round, init.announcement)
        except PeerError as error:
            late = Ack(round=init.round, upload=init.upload, status="late", reason=str(error))
            return [Acknowledge(event.device, late)]
        return this.inited(event)

    def _progressed(self, event: Complete | Accepted | Begun | Refused) -> list[Effect]:
        """Something became of an upload; the last one that is needed closes the round."""
        this = self._round
        if this is None:
            return []
        match event:
            case Complete(upload):
                return this.complete(upload)
            case Accepted(uploads):
                effects = [each for upload in uploads for each in this.accepted(upload)]
            case Begun(upload, missing):
                return this.begun(upload, missing)
            case Refused():
                effects = this.refused(event, now_s=self._now_s)
        return effects + self._close_if_reached(this) if effects else []

    def _shut_out(self, event: ShutOut) -> list[Effect]:
        device, this = event.device, self._round
        self._attendance.forget(device)
        if self._measuring is not None:
            self._measuring.forget(device)
        if this is None or self.phase not in (Phase.OPEN, Phase.CLOSING):
            return []
        place = this.uploads.get(device)
        counted = event.revoked and place is not None and place.status == "accepted"
        effects = this.shut_out(device, revoked=event.revoked)
        if self.phase is Phase.CLOSING and counted:  # it is decided again without the device
            self.phase, self.detail = Phase.OPEN, f"round {this.announcement.round} is open"
            effects += self._close_if_reached(this)
        return effects

    def _close_if_reached(self, this: Round) -> list[Effect]:
        return self._close() if this.reached and self.phase is Phase.OPEN else []

    # ── the end of a round ──────────────────────────────────────────────────────────────

    def _summary(self, state: Literal["closed", "abandoned"], reason: str = "") -> RoundSummary:
        assert self._round is not None  # noqa: S101 - a round is ending
        assert self.run is not None  # noqa: S101
        return self._round.summary(state, self.run, now_s=self._now_s, reason=reason)

    def _close(self) -> list[Effect]:
        self.phase, self.detail = Phase.CLOSING, "making the new model"
        return [CloseRound(self._summary("closed"))]

    def _abandon(self, reason: str, *, counts: bool = True) -> list[Effect]:
        summary = self._summary("abandoned", reason)
        self.last, self._round = summary, None
        self.phase, self.detail = Phase.GATHERING, f"round {summary.round} abandoned: {reason}"
        effects: list[Effect] = [AbandonRound(summary), Publish(summary)]
        if counts and self.run is not None:
            again = self.run.abandoned_in_a_row + 1
            self.run = replace(self.run, abandoned_in_a_row=again)
            if again >= self.rules.abandoned_max:
                effects += self._give_up(reason)
        return effects

    def _give_up(self, reason: str) -> list[Effect]:
        assert self.run is not None  # noqa: S101 - a run is ending
        count = self.run.abandoned_in_a_row
        return self._end("failed", f"{count} rounds in a row were abandoned: {reason}")

    def _closed(self, version: int, server_evaluates: bool) -> list[Effect]:
        if self.phase is not Phase.CLOSING or self.run is None:
            return []
        self.last = msgspec.structs.replace(self._summary("closed"), model_version=version)
        self._round = None
        done = self.run.rounds_done + 1
        self.run = replace(self.run, rounds_done=done, abandoned_in_a_row=0)
        self._begin_measuring(version, by_server=server_evaluates)
        if server_evaluates:
            return [Evaluate(version)]
        if not self.online_count("evaluate"):
            return self._decide(_NOBODY)
        return []

    # ── is it good enough? ──────────────────────────────────────────────────────────────

    def _begin_measuring(self, version: int, *, by_server: bool) -> None:
        self.phase, self.detail = Phase.EVALUATING, f"measuring model {version}"
        self._measuring = Measuring(
            version,
            by_server=by_server,
            now_s=self._now_s,
            wait_s=self.rules.evaluation_wait_s,
            examples_max=self._weight_max,
        )

    def _reported(self, device: str, report: Report) -> list[Effect]:
        this = self._measuring_now(report.model_version)
        if this is None:
            return []
        if device in self._trainers:
            raise PeerError("not_evaluating", f"{device} trains in this run; it cannot also judge")
        this.take(device, report)
        if this.by_server or not this.has_all(self.online("evaluate")):
            return []
        return self._decide(this.by_devices() or _NOBODY)

    def _measured(self, version: int, found: Measured) -> list[Effect]:
        return [] if self._measuring_now(version) is None else self._decide(found)

    def _measuring_now(self, version: int) -> Measuring | None:
        """The measuring of this model, if it goes on."""
        this = self._measuring
        at_it = self.phase is Phase.EVALUATING and this is not None and this.version == version
        return this if at_it else None

    def _decide(self, found: Measured) -> list[Effect]:
        run, last = self.run, self.last
        if run is None or last is None:
            return []
        if not found.metrics and self._measuring is not None:
            found = self._measuring.by_devices() or found
        self.last = msgspec.structs.replace(
            last,
            evaluation=dict(found.metrics),
            evaluation_examples=found.examples,
            evaluated_by=found.by,
        )
        effects: list[Effect] = [Publish(self.last)]
        if good_enough(run.until, found.metrics):
            return effects + self._end("done", f"the model reached the target: {found}")
        if run.rounds_done >= run.rounds:
            return effects + self._end("done", f"{run.rounds_done} rounds are done")
        self.phase = Phase.GATHERING
        return effects + self._gather()
