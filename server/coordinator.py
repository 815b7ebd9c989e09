"""A round, seen from the server: the rules, and nothing but the rules.

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
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Literal

import msgspec

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Busy,
    Command,
    Presence,
    Reply,
    Report,
    RoundSummary,
    Until,
)
from server.events import (
    AbandonRound,
    Accepted,
    Begun,
    Chunk,
    Closed,
    CloseRound,
    Commanded,
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
    Respond,
    Room,
    Rules,
    Run,
    Seen,
    Send,
    ShutOut,
    Started,
    StartRun,
    Tick,
    Upload,
)
from server.round import Round

__all__ = ["Coordinator", "Phase"]

_ROLL_CALL_S = 5.0  # in which devices say that they are there, after we or the broker came back


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
        self._presence: dict[str, Presence] = {}
        self._now_s = 0.0
        self._round: Round | None = None
        self._evaluation_until_s = 0.0
        self._model_version = 0
        self._reports: dict[str, Report] = {}
        self._server_evaluates = False
        self._trainers: set[str] = set()  # devices that joined in this run
        self._weight_max = LIMITS.examples_max
        self._connected = True
        self._trouble = ""  # with the disk

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
        return device in self._presence

    def online(self, role: str = "train") -> list[str]:
        """The devices of this role that are here."""
        return [
            device
            for device, presence in self._presence.items()
            if presence.role == role and presence.state not in ("lost", "sleeping")
        ]

    def status(self) -> dict[str, object]:
        """Everything an operator may want to know, as JSON types."""
        states = Counter(p.state for p in self._presence.values())
        found: dict[str, object] = {
            "federation": self.federation,
            "phase": "paused" if self.paused else self.phase.value,
            "detail": self._trouble or self.detail,
            "devices": {"online": len(self.online()), "evaluating": len(self.online("evaluate"))}
            | dict(states),
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
        self.last, self._model_version = last, last.model_version
        self._server_evaluates = server_evaluates
        self.phase, self.detail = Phase.EVALUATING, f"measuring model {last.model_version}"
        self._evaluation_until_s = self._now_s + self.rules.evaluation_wait_s
        if last.evaluation:
            return self._decide(last.evaluation, last.evaluation_examples, last.evaluated_by)
        return [Evaluate(last.model_version)] if server_evaluates else []

    # ── one step ────────────────────────────────────────────────────────────────────────

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do.

        Raises PeerError for what a peer should not have sent; nothing has changed then.
        """
        match event:
            case Tick(now_s):
                self._now_s = max(self._now_s, now_s)
                return self._tick()
            case LinkDown():
                self._connected = False
                return []
            case LinkUp(resumed):
                self._connected = True
                if not resumed:
                    self._presence.clear()  # whoever is there will say so again
                return []
            case Room(trouble):
                self._trouble = trouble
                return []
            case Commanded(command):
                return self._commanded(command)
            case Started(run):
                return self._started(run)
            case Seen(device, presence):
                self._presence[device] = presence
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
            case Begun() | Chunk() | Accepted() | Refused():
                return self._progressed(event)
            case Closed(version, server_evaluates):
                return self._closed(version, server_evaluates)
            case Evaluated(version, examples, metrics):
                return self._measured(version, examples, metrics, "server")
            case Reported(device, report):
                return self._reported(device, report)

    # ── the operator ────────────────────────────────────────────────────────────────────

    def _commanded(self, command: Command) -> list[Effect]:
        match command.cmd:
            case "start":
                return self._start(command)
            case "status":
                return [_answer(command, status=self.status())]
            case "stop":
                return self._stop(command)
            case "pause" | "resume":
                if self.run is None:
                    return [_refusal(command, 'no run is open; send {"cmd":"start"} first')]
                self.paused = command.cmd == "pause"
                marked = MarkPaused(self.run, self.paused)
                return [marked, _answer(command, status=self.status())]

    def _start(self, command: Command) -> list[Effect]:
        if self.run is not None:
            return [
                _refusal(
                    command,
                    f"run {self.run.id} of task {self.run.task!r} is open; "
                    'wait for it to end or send {"cmd":"stop"}',
                )
            ]
        target = command.target or self.rules.target
        quorum = command.quorum or self.rules.quorum
        if quorum < self.rules.quorum:
            least = self.rules.quorum
            return [_refusal(command, f"the quorum {quorum} is below this server's {least}")]
        if target and quorum > target:
            return [_refusal(command, f"the quorum {quorum} is more than the target {target}")]
        run = Run(
            id=0,
            task=command.task or "",
            rounds=command.rounds or (1 if command.until is None else 1000),
            until=command.until,
            target=target,
            quorum=quorum,
            deadline_s=command.deadline_s or self.rules.deadline_s,
        )
        return [StartRun(command, run)]

    def _started(self, run: Run) -> list[Effect]:
        if self.run is not None:
            return []
        self.run, self.phase, self.paused = run, Phase.GATHERING, False
        self.detail = "waiting for devices"
        self._trainers.clear()
        return self._tick()

    def _stop(self, command: Command) -> list[Effect]:
        if self.run is None:
            return [_refusal(command, "no run is open; there is nothing to stop")]
        effects: list[Effect] = []
        if self._round is not None:
            effects += self._abandon("stopped by the operator", counts=False)
        effects += self._end("stopped", "stopped by the operator")
        return [*effects, _answer(command, status=self.status())]

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
        if self.phase is Phase.EVALUATING and self._now_s >= self._evaluation_over_s:
            return self._decide({}, 0, "")
        return []

    @property
    def _evaluation_over_s(self) -> float:
        """Nobody is waited for who does not show up: after a restart all are unknown at first."""
        if self._server_evaluates or self.online("evaluate"):
            return self._evaluation_until_s
        return self._evaluation_until_s - max(0.0, self.rules.evaluation_wait_s - _ROLL_CALL_S)

    def _gather(self) -> list[Effect]:
        run = self.run
        if run is None or self.paused:
            return []
        if self._trouble:
            return []  # nothing is begun that could not be finished
        if not self._connected:
            self.detail = "waiting for the broker"  # a round that nobody hears of would be lost
            return []
        online = len(self.online())
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
            opened, self.rules, now_s=self._now_s, rejects=self.rejects, is_lost=self._is_lost
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
            return [Send(event.device, late)]
        return this.inited(event)

    def _progressed(self, event: Begun | Chunk | Accepted | Refused) -> list[Effect]:
        """Something became of an upload; the last one that is needed closes the round."""
        this = self._round
        if this is None:
            return []
        match event:
            case Begun(upload, missing):
                return this.begun(upload, missing)
            case Chunk(upload, still_missing):
                return this.chunk(upload, still_missing)
            case Accepted(upload):
                effects = this.accepted(upload)
            case Refused():
                effects = this.refused(event, now_s=self._now_s)
        return effects + self._close_if_reached(this) if effects else []

    def _shut_out(self, event: ShutOut) -> list[Effect]:
        device, this = event.device, self._round
        self._presence.pop(device, None)
        self._reports.pop(device, None)
        if this is None or self.phase not in (Phase.OPEN, Phase.CLOSING):
            return []
        place = this.uploads.get(device)
        counted = event.revoked and place is not None and place.status == "accepted"
        effects = this.shut_out(device, revoked=event.revoked)
        if self.phase is Phase.CLOSING and counted:  # it is decided again without the device
            self.phase, self.detail = Phase.OPEN, f"round {this.announcement.round} is open"
            effects += self._close_if_reached(this)
        return effects

    def _is_lost(self, device: str) -> bool:
        presence = self._presence.get(device)
        return presence is not None and presence.state == "lost"

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
        self._model_version, self._reports = version, {}
        self._server_evaluates = server_evaluates
        self.phase, self.detail = Phase.EVALUATING, f"measuring model {version}"
        self._evaluation_until_s = self._now_s + self.rules.evaluation_wait_s
        if server_evaluates:
            return [Evaluate(version)]
        if not self.online("evaluate"):
            return self._decide({}, 0, "")
        return []

    # ── is it good enough? ──────────────────────────────────────────────────────────────

    def _reported(self, device: str, report: Report) -> list[Effect]:
        if self.phase is not Phase.EVALUATING or report.model_version != self._model_version:
            return []
        if device in self._trainers:
            raise PeerError("not_evaluating", f"{device} trains in this run; it cannot also judge")
        examples = min(report.examples, self._weight_max)
        self._reports[device] = msgspec.structs.replace(report, examples=examples)
        if self._server_evaluates or not set(self.online("evaluate")) <= set(self._reports):
            return []
        return self._decide(*_weighted(self._reports), "devices")

    def _measured(
        self, version: int, examples: int, metrics: Mapping[str, float], by: str
    ) -> list[Effect]:
        if self.phase is not Phase.EVALUATING or version != self._model_version:
            return []
        return self._decide(dict(metrics), examples, by)

    def _decide(self, metrics: dict[str, float], examples: int, by: str) -> list[Effect]:
        run, last = self.run, self.last
        if run is None or last is None:
            return []
        if not metrics and self._reports:
            (metrics, examples), by = _weighted(self._reports), "devices"
        self.last = msgspec.structs.replace(
            last, evaluation=metrics, evaluation_examples=examples, evaluated_by=by
        )
        effects: list[Effect] = [Publish(self.last)]
        if _good_enough(run.until, metrics):
            return effects + self._end("done", f"the model reached the target: {_brief(metrics)}")
        if run.rounds_done >= run.rounds:
            return effects + self._end("done", f"{run.rounds_done} rounds are done")
        self.phase = Phase.GATHERING
        return effects + self._gather()


def _weighted(reports: Mapping[str, Report]) -> tuple[dict[str, float], int]:
    """The means over all examples that devices reported on."""
    examples = sum(r.examples for r in reports.values())
    names = set.intersection(*(set(r.metrics) for r in reports.values()))
    return {
        # Shares first: a sum of products could leave the range of a float.
        name: sum(r.metrics[name] * (r.examples / examples) for r in reports.values())
        for name in sorted(names)
    }, examples


def _good_enough(until: Until | None, metrics: Mapping[str, float]) -> bool:
    if until is None or not metrics:
        return False
    # Written so that NaN, of which every comparison is false, is never good enough.
    if until.accuracy is not None and not metrics.get("accuracy", 0.0) >= until.accuracy:
        return False
    return until.loss is None or metrics.get("loss", float("inf")) <= until.loss


def _brief(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _answer(command: Command, *, status: dict[str, object] | None = None) -> Respond:
    return Respond(Reply(ok=True, cmd=command.cmd, id=command.id, status=status))


def _refusal(command: Command, sentence: str) -> Respond:
    return Respond(Reply(ok=False, cmd=command.cmd, id=command.id, error=sentence))
