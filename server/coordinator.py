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
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

import msgspec

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.wire.chunks import bitmap_of
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Busy,
    Command,
    Go,
    Init,
    Join,
    Need,
    Presence,
    Reply,
    Report,
    RoundSummary,
    Until,
)
from server.cohort import invitations
from server.events import (
    AbandonRound,
    Accept,
    Accepted,
    BeginUpload,
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
    Forget,
    Inited,
    Joined,
    LinkDown,
    LinkUp,
    MarkPaused,
    Opened,
    OpenRound,
    Publish,
    Refuse,
    Refused,
    Reported,
    Respond,
    Room,
    Rules,
    Run,
    Seen,
    Send,
    Started,
    StartRun,
    Tick,
    Upload,
)

__all__ = ["Coordinator", "Phase"]

Status = Literal["going", "accepting", "accepted", "rejected"]
_REASON_CHARS_MAX = 500  # what an `Ack` takes
_NO_ROOM = "the server has no room on its disk"
_ROLL_CALL_S = 5.0  # in which devices say that they are there, after we or the broker came back


class Phase(Enum):
    """Where the run is."""

    IDLE = "idle"
    GATHERING = "gathering"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    EVALUATING = "evaluating"


@dataclass
class _Round:
    """The open round."""

    announcement: Announcement
    digest: bytes
    update_bytes: int
    target: int
    quorum: int
    opened_s: float
    uploads: dict[str, Upload] = field(default_factory=dict)  # by device
    joined: set[str] = field(default_factory=set)

    counts: Counter[str] = field(default_factory=Counter)  # of uploads, by status

    @property
    def accepted(self) -> list[Upload]:
        return [u for u in self.uploads.values() if u.status == "accepted"]

    def count(self, *statuses: str) -> int:
        """How many uploads have one of these statuses. Asked for each message: no loop."""
        return sum(self.counts[status] for status in statuses)

    def put(self, place: Upload) -> None:
        """Give a device this place, instead of the one it may have had."""
        former = self.uploads.get(place.device)
        if former is not None:
            self.counts[former.status] -= 1
        self.uploads[place.device] = place
        self.counts[place.status] += 1

    def mark(self, place: Upload, status: Status) -> None:
        """Change how far an upload is."""
        self.counts[place.status] -= 1
        place.status = status
        self.counts[status] += 1


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
        self._round: _Round | None = None
        self._by_upload: dict[bytes, Upload] = {}
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
        return self._by_upload.get(upload)

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
            found["round"] = {
                "number": self._round.announcement.round,
                "target": self._round.target,
                "quorum": self._round.quorum,
                "invited": len(self._round.uploads),
                "uploading": sum(u.init is not None for u in self._round.uploads.values()),
                "accepted": self._round.count("accepted"),
                "seconds_left": round(self._over_s - self._now_s, 1),
            }
        return found

    @property
    def _over_s(self) -> float:
        assert self._round is not None  # noqa: S101 - asked only while a round is open
        return self._round.opened_s + self._round.announcement.deadline_s

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
        if opened is None:
            return [] if last is None else self._take_up_measuring(last, server_evaluates)
        self._begin(opened)
        assert self._round is not None  # noqa: S101 - _begin made it
        self._round.opened_s = now_s - min(elapsed_s, opened.announcement.deadline_s)
        for upload in uploads:
            self._round.joined.add(upload.device)
            self._trainers.add(upload.device)
            self._round.put(upload)
            self._by_upload[upload.upload] = upload
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
            case Opened():
                if self.phase is Phase.OPENING:
                    self._begin(event)
                return []
            case Joined():
                return self._joined(event)
            case Inited():
                return self._inited(event)
            case Begun(upload, missing):
                return self._begun(upload, missing)
            case Chunk(upload, missing):
                return self._chunk(upload, missing)
            case Accepted(upload):
                return self._accepted(upload)
            case Refused():
                return self._refused(event)
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
        if self.phase is Phase.OPEN and self._now_s >= self._over_s:
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
        self._by_upload.clear()
        self._weight_max = opened.announcement.weight_max
        self._round = _Round(
            announcement=opened.announcement,
            digest=opened.digest,
            update_bytes=opened.update_bytes,
            target=opened.announcement.target,
            quorum=opened.announcement.quorum,
            opened_s=self._now_s,
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

    # ── joining ─────────────────────────────────────────────────────────────────────────

    def _current(self, number: int, digest: bytes) -> _Round:
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
        this.joined.add(device)
        self._trainers.add(device)
        place = this.uploads.get(device)
        if place is not None and place.status in ("accepted", "rejected", "accepting"):
            return self._final(this, place)
        if place is None and self._trouble:
            busy = Busy(round=join.round, retry_after_s=self.rules.retry_after_s, reason=_NO_ROOM)
            return [Send(device, busy)]
        if place is None and self._full(this):
            wait_s = max(self.rules.retry_after_s, (self._over_s - self._now_s) / 8)
            busy = Busy(round=join.round, retry_after_s=wait_s, reason="the cohort is full")
            return [Send(device, busy)]
        effects: list[Effect] = []
        if place is None or place.init is not None:
            # A device that joins again after its commit has lost its outbox: a new attempt,
            # a new id, so that no key is used twice.
            attempt = 0
            if place is not None:
                attempt = place.attempt + 1
                self._by_upload.pop(place.upload)
                effects.append(Forget(place.upload))
            if attempt >= len(event.uploads):
                busy = Busy(round=join.round, retry_after_s=-1, reason="too many attempts")
                return [*effects, Send(device, busy)]
            size = self._packet_bytes(join)
            place = Upload(device, event.uploads[attempt], size, attempt=attempt)
            self._by_upload[place.upload] = place
            this.put(place)
        return [*effects, Send(device, self._go(this, place))]

    def _full(self, this: _Round) -> bool:
        """Whether every place is taken. A device that was lost gives its place to another."""
        most = min(invitations(this.target), self.rules.uploads_max)
        places = this.count("going", "accepting", "accepted")
        if places < most:
            return False
        lost = sum(u.status == "going" and self._is_lost(u.device) for u in this.uploads.values())
        return places - lost >= most

    def _is_lost(self, device: str) -> bool:
        presence = self._presence.get(device)
        return presence is not None and presence.state == "lost"

    def _packet_bytes(self, join: Join) -> int:
        wanted = min(join.packet_bytes_max or self.rules.packet_bytes_max, LIMITS.packet_bytes_max)
        return max(LIMITS.packet_bytes_min, min(wanted, self.rules.packet_bytes_max))

    def _go(self, this: _Round, place: Upload) -> Go:
        return Go(
            round=this.announcement.round,
            announcement=this.digest,
            upload=place.upload,
            shard=0,
            packet_bytes=place.packet_bytes,
            window=self.rules.window,
        )

    def _final(self, this: _Round, place: Upload) -> list[Effect]:
        """The answer that a finished upload always gets."""
        if place.status == "accepting":
            return []
        status: Literal["accepted", "rejected"] = (
            "accepted" if place.status == "accepted" else "rejected"
        )
        ack = Ack(
            round=this.announcement.round, upload=place.upload, status=status, reason=place.reason
        )
        return [Send(place.device, ack)]

    # ── uploads ─────────────────────────────────────────────────────────────────────────

    def _inited(self, event: Inited) -> list[Effect]:
        device, init = event.device, event.init
        try:
            this = self._current(init.round, init.announcement)
        except PeerError as error:
            late = Ack(round=init.round, upload=init.upload, status="late", reason=str(error))
            return [Send(device, late)]
        place = self._by_upload.get(init.upload)
        if place is None and event.ours and device not in this.uploads:
            # Let in before we were restarted: the id proves it.
            place = Upload(device, init.upload, packet_bytes=0)
            self._by_upload[init.upload] = place
            this.put(place)
        if place is None or place.device != device:
            raise PeerError("unasked_upload", f"{device} sent an upload that nobody asked for")
        if place.status != "going":
            return self._final(this, place)
        if place.init is not None and place.init != init:
            raise PeerError("changed_commit", f"{device} changed the commit of an upload")
        reason = self._objection(this, place, init)
        if reason is not None:
            return self._reject(place, *reason)
        place.init = init
        return [BeginUpload(device, init)]

    def _objection(self, this: _Round, place: Upload, init: Init) -> tuple[str, str] | None:
        if init.examples < 1:
            return "no_examples", "an update must come from at least one example"
        if init.examples > this.announcement.weight_max:
            most = this.announcement.weight_max
            return "absurd_examples", f"{init.examples} examples; this round allows {most}"
        if init.total_bytes != this.update_bytes:
            return (
                "wrong_size",
                f"{init.total_bytes} bytes; an update of this task has {this.update_bytes}",
            )
        packet_bytes = place.packet_bytes or self.rules.packet_bytes_max
        largest = init.layout.for_packets(init.total_bytes, packet_bytes).body_bytes
        smallest = LIMITS.packet_bytes_min // 2 if place.packet_bytes == 0 else largest
        if not smallest <= init.body_bytes <= largest:
            return "wrong_size", f"chunks of {init.body_bytes} bytes were not agreed on"
        return None

    def _reject(self, place: Upload, kind: str, reason: str) -> list[Effect]:
        self.rejects[kind] += 1
        assert self._round is not None  # noqa: S101 - a place is in a round
        self._round.mark(place, "rejected")
        place.reason = reason[:_REASON_CHARS_MAX]
        return [
            Refuse(place.device, place.upload, reason),
            *self._final(self._round, place),
        ]

    def _begun(self, upload: bytes, missing: tuple[int, ...]) -> list[Effect]:
        place = self._by_upload.get(upload)
        if place is None or place.init is None:
            return []
        if not missing:
            return self._complete(place, place.init)
        count = place.init.layout.count
        return [Send(place.device, Need(upload=upload, bitmap=bitmap_of(missing, count)))]

    def _chunk(self, upload: bytes, missing: int) -> list[Effect]:
        place = self._by_upload.get(upload)
        if place is None or place.init is None or missing or place.status != "going":
            return []
        return self._complete(place, place.init)

    def _complete(self, place: Upload, init: Init) -> list[Effect]:
        if place.status != "going" or self._round is None:
            return []
        self._round.mark(place, "accepting")
        return [Accept(place.device, init)]

    def _accepted(self, upload: bytes) -> list[Effect]:
        place, this = self._by_upload.get(upload), self._round
        if place is None or this is None or place.status != "accepting":
            return []
        this.mark(place, "accepted")
        return self._final(this, place) + self._close_if_reached(this)

    def _refused(self, event: Refused) -> list[Effect]:
        place, this = self._by_upload.get(event.upload), self._round
        if place is None or this is None or place.status not in ("going", "accepting"):
            return []
        if place.status == "going" and self._now_s < place.quiet_until_s:
            return []  # it was told already: this is what was still on its way
        if event.status == "rejected":
            kind, _, reason = event.reason.partition(": ")
            return self._reject(place, kind, reason or kind) + self._close_if_reached(this)
        this.mark(place, "going")
        place.quiet_until_s = self._now_s + self.rules.retry_after_s
        ack = Ack(
            round=this.announcement.round,
            upload=event.upload,
            status=event.status,
            reason=event.reason[:_REASON_CHARS_MAX],
            retry_after_s=self.rules.retry_after_s,
        )
        return [Send(place.device, ack), *self._close_if_reached(this)]

    def _close_if_reached(self, this: _Round) -> list[Effect]:
        """Close at the target, once no update is between disk and sum."""
        if this.count("accepted") >= this.target and not this.count("accepting"):
            return self._close()
        return []

    # ── the end of a round ──────────────────────────────────────────────────────────────

    def _summary(self, state: Literal["closed", "abandoned"], reason: str = "") -> RoundSummary:
        this, run = self._round, self.run
        assert this is not None  # noqa: S101 - a round is ending
        assert run is not None  # noqa: S101
        inits = [u.init for u in this.accepted if u.init is not None]
        examples = sum(i.examples for i in inits)
        losses = [i.metrics["loss"] * (i.examples / examples) for i in inits if "loss" in i.metrics]
        return RoundSummary(
            federation=self.federation,
            run=run.id,
            round=this.announcement.round,
            state=state,
            task=run.task,
            model_version=this.announcement.model_version,
            invited=len(this.uploads),
            joined=len(this.joined),
            accepted=len(inits),
            rejected=this.count("rejected"),
            target=this.target,
            quorum=this.quorum,
            examples=examples,
            train_loss=sum(losses) if losses else None,
            update_bytes=this.update_bytes,
            round_s=self._now_s - this.opened_s,
            train_s_max=max((i.train_s for i in inits), default=0.0),
            reason=reason,
        )

    def _close(self) -> list[Effect]:
        self.phase, self.detail = Phase.CLOSING, "making the new model"
        return [CloseRound(self._summary("closed"))]

    def _abandon(self, reason: str, *, counts: bool = True) -> list[Effect]:
        summary = self._summary("abandoned", reason)
        self.last, self._round = summary, None
        self._by_upload.clear()
        self.phase, self.detail = Phase.GATHERING, f"round {summary.round} abandoned: {reason}"
        effects: list[Effect] = [AbandonRound(summary), Publish(summary)]
        if counts and self.run is not None:
            again = self.run.abandoned_in_a_row + 1
            self.run = replace(self.run, abandoned_in_a_row=again)
            if again >= self.rules.abandoned_max:
                effects += self._end("failed", f"{again} rounds in a row were abandoned: {reason}")
        return effects

    def _closed(self, version: int, server_evaluates: bool) -> list[Effect]:
        if self.phase is not Phase.CLOSING or self.run is None:
            return []
        self.last = msgspec.structs.replace(
            self._summary("closed"), model_version=version, round_s=self._round_s
        )
        self._round = None
        self._by_upload.clear()
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

    @property
    def _round_s(self) -> float:
        assert self._round is not None  # noqa: S101 - CLOSING implies it
        return self._now_s - self._round.opened_s

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
