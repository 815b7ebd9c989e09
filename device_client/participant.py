"""A round, seen from the device: the rules, and nothing but the rules.

Events go in, effects come out. Time comes in with each event; randomness comes in as
a function. What arrives here has already been verified by the agent, so a forged
message never becomes an event; what is stale, repeated or unasked for is ignored here.

    IDLE ─ announced, drawn ─► WAITING ─ jitter over ─► JOINING ─ go ─► FETCHING ─ task and
    model here ─► TRAINING ─ trained ─► SEALING ─ in the outbox ─► UPLOADING ─ receipt ─► IDLE

A device in the role `evaluate` never trains: it goes IDLE ─ new model ─► FETCHING ─►
EVALUATING ─► IDLE and reports counts and means.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import Literal

from broker_bridge.limits import LIMITS
from broker_bridge.wire.chunks import CHUNK_OVERHEAD_BYTES, missing_in
from broker_bridge.wire.lottery import drawn
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Blob,
    Busy,
    Go,
    Init,
    Join,
    Need,
    NeedBlob,
    Report,
)
from device_client.events import (
    Announced,
    Answered,
    Discard,
    Effect,
    Eligible,
    Evaluate,
    Evaluated,
    Event,
    Failed,
    Fetch,
    Fetched,
    Fetching,
    Keep,
    LinkDown,
    LinkUp,
    Memory,
    Remember,
    RenewalAsked,
    RenewalRefused,
    Renewed,
    Room,
    Seal,
    Sealed,
    Send,
    SendChunks,
    Stop,
    Tick,
    Train,
    Trained,
)
from device_client.renewing import SPREAD_S, Renewing

__all__ = ["Participant", "State"]

# How long to wait before asking again, and how often (AWS IoT's streams use the same).
SILENCE_S = 10.0
TRIES_MAX = 32
KEEP_S = 300.0  # how long to wait for a model that is for this device's own programs
_AGAIN_S = 1.0  # the shortest time between two questions that nobody answered


class State(Enum):
    """Where the device is in a round."""

    IDLE = "idle"
    WAITING = "waiting"
    JOINING = "joining"
    FETCHING = "fetching"
    TRAINING = "training"
    SEALING = "sealing"
    UPLOADING = "uploading"
    EVALUATING = "evaluating"


class Participant:
    """One device in a federation, one round at a time."""

    def __init__(
        self,
        device: str,
        *,
        memory: Memory,
        samples: int,
        role: Literal["train", "evaluate"] = "train",
        fleet_epochs: frozenset[int] = frozenset({0}),
        kept_version: int | None = None,
        draw: Callable[[], float],
    ) -> None:
        """`kept_version`: of the model that this device's own programs use, 0 if they have none
        yet; None: no model is kept for them."""
        self.device = device
        self.memory = memory
        self.samples = samples
        self.role = role
        self.state = State.IDLE
        self.detail = ""
        self._fleet_epochs = fleet_epochs  # whose keys we have
        self._draw = draw  # uniform in [0, 1)
        self._renewing = Renewing(draw)
        self._sealed_news: Announced | None = None  # of a fleet key that we wait for
        self._now_s = 0.0
        self._at_s = 0.0  # when to act next if nothing is heard
        self._asked_s = 0.0
        self._connected = True
        self._tries = 0
        self._announcement: Announcement | None = None
        self._digest = b""
        self._over_s = 0.0
        self._limits = LinkUp(0, 0)
        self._go: Go | None = None
        self._task = b""  # digest of the task at hand
        self._outbox: Init | None = None
        self._to_send: deque[int] = deque()
        self._report: Report | None = None  # the last one, of a device that evaluates
        self._against = ""  # what the owner's rules have against working now
        self._against_network = ""
        self._postponed: Announcement | None = None  # a model to evaluate when they allow it
        self._kept_version = kept_version
        self._keeping = False  # whether what is fetched is for this device's own programs
        self._accepted = -1  # the last round with an update of ours

    @property
    def round(self) -> int:
        """The round the device is in, or the last one it saw."""
        return self.memory.round

    @property
    def fleet_epoch(self) -> int:
        """Which fleet key opens task and model of the round the device is in."""
        newest = max(self._fleet_epochs)
        return newest if self._announcement is None else self._announcement.fleet_epoch

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do."""
        match event:
            case Tick(now_s):
                self._now_s = max(self._now_s, now_s)
                return self._tick()
            case LinkUp():
                self._limits, self._connected, self._tries = event, True, 0
                self._renewing.connected(self._now_s)
                return self._connected_again()
            case LinkDown():
                self._connected = False
                return []
            case Announced(announcement, digest):
                return self._announced(announcement, digest)
            case Answered(message):
                return self._answered(message)
            case Fetching():
                return self._still_fetching()
            case Fetched(kind, digest):
                return self._fetched(kind, digest)
            case Trained(number):
                return self._trained(number)
            case Evaluated():
                return self._evaluated(event)
            case Failed(number, reason):
                return self._failed(number, reason)
            case Sealed(init):
                return self._sealed(init)
            case Eligible(against, network):
                return self._judged(against, network)
            case RenewalAsked(keys, spread_s):
                self._renewing.want(self._now_s, keys=keys, spread_s=spread_s)
                return []
            case Renewed():
                return self._renewed(event)
            case RenewalRefused(reason):
                self.detail = reason
                self._renewing.refused(self._now_s)
                return []
            case Room(publishes):
                return self._send_some(publishes)

    # ── the announcement ────────────────────────────────────────────────────────────────

    def _announced(self, announcement: Announcement, digest: bytes) -> list[Effect]:
        number = announcement.round
        if number < self.memory.round:
            return []  # stale or replayed: rounds only grow
        if announcement.fleet_epoch not in self._fleet_epochs:
            return self._sealed_for_others(announcement, digest)
        if announcement.state == "closed":
            return self._closed(announcement)
        if number == self.memory.round and digest != self.memory.digest:
            return []  # this round was opened otherwise: a round has one opening
        if digest == self._digest:
            return self._announced_again(announcement)
        return self._opened(announcement, digest)

    def _sealed_for_others(self, announcement: Announcement, digest: bytes) -> list[Effect]:
        """Task and model are sealed under a fleet key that we have not."""
        effects: list[Effect] = []
        if announcement.state == "closed" and self.role == "train":
            effects = self._closed(announcement)  # its end needs no key
        if announcement.fleet_epoch < max(self._fleet_epochs):
            self.detail = "this round is sealed under a fleet key from before our time"
            return effects
        self.detail = "the fleet key changed; asking the server for the new one"
        known, self._sealed_news = self._sealed_news, Announced(announcement, digest)
        anew = known is None or announcement.round > known.announcement.round
        spread_s = max(announcement.jitter_s, SPREAD_S)
        self._renewing.want(self._now_s, spread_s=spread_s, anew=anew)
        return effects

    def _renewed(self, event: Renewed) -> list[Effect]:
        """The server answered: take up what waited for it."""
        self._fleet_epochs = event.fleet_epochs
        self._renewing.done(keys=event.keys)
        effects: list[Effect] = []
        if event.keys and self._outbox is not None:
            if self.state is State.UPLOADING:
                effects += self._begin_anew()
            else:
                self._outbox = None
        news, self._sealed_news = self._sealed_news, None
        return effects + ([] if news is None else self._announced(news.announcement, news.digest))

    def _connected_again(self) -> list[Effect]:
        match self.state:
            case State.JOINING:
                return self._ask_again()
            case State.UPLOADING:
                return self._upload()
            case State.FETCHING:
                self._heard()  # the broker goes on by itself; asked for, all would come again
        return []

    def _announced_again(self, announcement: Announcement) -> list[Effect]:
        """The server or the broker came back: what we asked for last may be lost with it."""
        if self.state in (State.JOINING, State.UPLOADING):
            soon_s = max(self._now_s, self._asked_s + _AGAIN_S)
            self._at_s = min(self._at_s, soon_s + self._draw() * announcement.jitter_s)
        return []

    def _closed(self, announcement: Announcement) -> list[Effect]:
        effects: list[Effect] = []
        if announcement.round > self.memory.round or not self.memory.done:
            if self.role == "train":
                effects += self._leave("the round was closed")
            digest = self.memory.digest if announcement.round == self.memory.round else b""
            effects += self._remember(round=announcement.round, digest=digest, done=True)
        return effects + (
            self._evaluate_new(announcement)
            or self._report_again(announcement)
            or self._keep_new(announcement)
        )

    def _opened(self, announcement: Announcement, digest: bytes) -> list[Effect]:
        """A round is open that we have not begun in this life of the process."""
        effects: list[Effect] = []
        if self._outbox is not None and self._outbox.announcement != digest:
            effects += [Discard(self._outbox.upload)]
            self._outbox = None
        if announcement.round > self.memory.round:
            if self.role == "train":
                effects += self._leave("a newer round was announced")
            effects += self._remember(round=announcement.round, digest=digest, done=False)
        if self.role == "evaluate":
            return effects + self._evaluate_new(announcement)
        self._announcement, self._digest = announcement, digest
        self._over_s = self._now_s + announcement.deadline_s
        if self.memory.done:
            return effects
        if self._outbox is not None:
            return effects + self._upload()
        if not drawn(announcement.lottery_seed, self.device, announcement.lottery_threshold):
            self.detail = f"not drawn for round {announcement.round}"
            return effects + self._remember(done=True)
        self.state = State.WAITING
        self._at_s = self._now_s + self._draw() * announcement.jitter_s
        return effects + self._tick_of_round()

    def _remember(self, **changes: object) -> list[Effect]:
        self.memory = replace(self.memory, **changes)  # type: ignore[arg-type]
        return [Remember(self.memory)]

    def _leave(self, reason: str) -> list[Effect]:
        """Give up whatever the present round had us do."""
        effects: list[Effect] = []
        if self.state in (State.FETCHING, State.TRAINING, State.SEALING, State.EVALUATING):
            effects.append(Stop(reason))
        if self._outbox is not None:
            effects.append(Discard(self._outbox.upload))
        self.state, self.detail = State.IDLE, reason
        self._outbox = self._go = self._announcement = None
        self._digest = b""
        self._keeping = False
        self._to_send.clear()
        return effects

    # ── the owner's rules ───────────────────────────────────────────────────────────────

    def _judged(self, against: str, network: str) -> list[Effect]:
        before = self._against, self._against_network
        self._against, self._against_network = against, network
        if against:
            return self._give_way()
        return self._go_on() if any(before) else []

    def _give_way(self) -> list[Effect]:
        """Stop at the next step. What is sealed is sent, unless the network is the reason."""
        if self.state in (State.WAITING, State.JOINING):
            self.state, self.detail = State.WAITING, self._against
            return []
        if self.state not in (State.FETCHING, State.TRAINING, State.EVALUATING):
            return []
        if self._keeping or self.role == "evaluate":
            self._postponed = None if self._keeping else self._announcement
            return self._leave(self._against)
        self.state, self.detail, self._go = State.WAITING, self._against, None
        return [Stop(self._against)]

    def _go_on(self) -> list[Effect]:
        """Nothing is against it any more. Many devices may hear that at one hour: spread them."""
        if self.state is State.WAITING and self._announcement is not None:
            self.detail = ""
            self._at_s = self._now_s + self._draw() * self._announcement.jitter_s
        if self.state is State.UPLOADING:
            self._tries = 0
            return self._ask_again()
        postponed, self._postponed = self._postponed, None
        return [] if postponed is None else self._evaluate_new(postponed)

    # ── joining ─────────────────────────────────────────────────────────────────────────

    def _tick(self) -> list[Effect]:
        renew = self._renewing if self._connected else None
        at_rest = self.state is State.IDLE and self._outbox is None
        asked: list[Effect] = [] if renew is None else [*renew.due(self._now_s, at_rest=at_rest)]
        return asked + self._tick_of_round()

    def _tick_of_round(self) -> list[Effect]:
        if self._announcement is not None and self._now_s >= self._over_s and self._busy_in_round:
            effects = self._leave("the round's deadline is over")
            return effects + self._remember(done=True)
        if self._now_s < self._at_s:
            return []
        if self.state is State.WAITING:
            if self._against:
                self.detail = self._against
                return []
            self.state, self._tries = State.JOINING, 0
            return self._ask_again()
        if self.state in _ASKING and not self._to_send:
            return self._ask_again()
        return []

    @property
    def _busy_in_round(self) -> bool:
        return self.state not in (State.IDLE, State.EVALUATING) and self.role == "train"

    def _ask_again(self) -> list[Effect]:
        """Nothing was heard for a while: ask once more, at most TRIES_MAX times."""
        if not self._connected:
            return []  # a broker that is away is no server that is silent: asked at LinkUp
        if self.state is State.UPLOADING and self._against_network:
            return []  # asked when the owner's rules allow it
        self._tries += 1
        if self._tries > TRIES_MAX:
            self._tries = 0
            effects = self._leave("the server did not answer")
            return effects + self._remember(done=True)
        self._asked_s = self._now_s
        self._at_s = self._now_s + SILENCE_S * (0.75 + 0.5 * self._draw())
        if self.state is State.JOINING:
            return [Send(self._join())]
        if self.state is State.UPLOADING and self._outbox is not None:
            return [Send(self._outbox)]
        if self.state is State.FETCHING and self._announcement is not None:
            return [Send(NeedBlob(kind=kind, digest=blob.digest)) for kind, blob in self._wanted()]
        return []

    def _join(self) -> Join:
        assert self._announcement is not None  # noqa: S101 - JOINING implies it
        return Join(
            round=self._announcement.round,
            announcement=self._digest,
            samples=self.samples,
            packet_bytes_max=self._limits.packet_bytes_max,
            inflight_max=self._limits.inflight_max,
        )

    def _answered(self, message: Go | Busy | Need | Ack) -> list[Effect]:
        match message:
            case Go():
                return self._went(message)
            case Busy():
                return self._told_to_wait(message)
            case Need():
                return self._needed(message)
            case Ack():
                return self._receipt(message)

    def _went(self, go: Go) -> list[Effect]:
        if self.state is not State.JOINING or go.announcement != self._digest:
            return []
        self._go, self.state = go, State.FETCHING
        return self._fetch()

    def _told_to_wait(self, busy: Busy) -> list[Effect]:
        if self.state is not State.JOINING or busy.round != self.memory.round:
            return []
        self.detail = busy.reason
        if busy.retry_after_s < 0:
            return [*self._leave(busy.reason), *self._remember(done=True)]
        self.state = State.WAITING
        self._at_s = self._now_s + busy.retry_after_s * (1 + 0.25 * self._draw())
        return []

    # ── task and model ──────────────────────────────────────────────────────────────────

    def _wanted(self) -> Sequence[tuple[Literal["task", "model"], Blob]]:
        """The next thing that is missing: the task first, for it says what a model is."""
        assert self._announcement is not None  # noqa: S101 - FETCHING implies it
        if self._task != self._announcement.task.digest:
            return (("task", self._announcement.task),)
        return (("model", self._announcement.model),)

    def _fetch(self) -> list[Effect]:
        self._at_s, self._tries = self._now_s + SILENCE_S, 0
        return [Fetch(kind, blob) for kind, blob in self._wanted()]

    def _fetched(self, kind: Literal["task", "model"], digest: bytes) -> list[Effect]:
        if self.state is not State.FETCHING or self._announcement is None:
            return []
        if kind == "task" and digest == self._announcement.task.digest:
            self._task = digest
            return self._fetch()
        if kind != "model" or digest != self._announcement.model.digest:
            return []
        kept = self._keep(self._announcement)
        if self._keeping:
            self.state, self._keeping, self._announcement = State.IDLE, False, None
            return kept
        if self.role == "evaluate":
            self.state = State.EVALUATING
            return [*kept, Evaluate(self._announcement.model_version)]
        self.state = State.TRAINING
        return [Train(self._announcement.round, self._announcement.settings), *kept]

    def _still_fetching(self) -> list[Effect]:
        if self.state is State.FETCHING:
            self._heard()
        return []

    # ── training and sealing ────────────────────────────────────────────────────────────

    def _trained(self, number: int) -> list[Effect]:
        if self.state is not State.TRAINING or number != self.memory.round:
            return []
        assert self._announcement is not None  # noqa: S101 - TRAINING implies both
        assert self._go is not None  # noqa: S101
        self.state = State.SEALING
        return [Seal(self._announcement, self._digest, self._go)]

    def _failed(self, number: int, reason: str) -> list[Effect]:
        if self.state not in _WORKING or number != self.memory.round:
            return []
        effects = self._leave(reason)
        return effects + self._remember(done=True)

    def _sealed(self, init: Init) -> list[Effect]:
        if self.state is State.SEALING and init.announcement == self._digest:
            self._outbox = init
            return self._upload()
        at_start = self.state is State.IDLE and not self.memory.done
        if at_start and init.announcement == self.memory.digest:
            self._outbox = init  # found at start; goes on when the round is announced again
            return []
        return [Discard(init.upload)]

    # ── the upload ──────────────────────────────────────────────────────────────────────

    def _upload(self) -> list[Effect]:
        self.state, self._tries = State.UPLOADING, 0
        if self._too_large_by_now:
            return self._begin_anew()
        return self._ask_again()  # the commit first; the answer says which chunks to send

    @property
    def _too_large_by_now(self) -> bool:
        """Whether the broker takes smaller packets than the update was cut for."""
        if self._outbox is None or self._limits.packet_bytes_max == 0:
            return False
        body_bytes = min(self._outbox.body_bytes, self._outbox.total_bytes)
        packet_bytes = body_bytes + CHUNK_OVERHEAD_BYTES + LIMITS.packet_overhead_bytes
        return packet_bytes > self._limits.packet_bytes_max

    def _begin_anew(self) -> list[Effect]:
        """Give up this attempt and join again: what is sealed is never cut another way."""
        assert self._outbox is not None  # noqa: S101 - there is one that is too large
        given_up = Discard(self._outbox.upload)
        self._outbox, self.state = None, State.JOINING
        self._to_send.clear()
        return [given_up, *self._ask_again()]

    def _needed(self, need: Need) -> list[Effect]:
        if not self._is_ours(need.upload) or self._outbox is None:
            return []
        self._to_send = deque(missing_in(need.bitmap, self._outbox.layout.count))
        self._heard()
        return []

    def _send_some(self, publishes: int) -> list[Effect]:
        if self.state is not State.UPLOADING or self._outbox is None or not self._to_send:
            return []
        if self._against_network:
            return []
        window = min(publishes, len(self._to_send), self._window(publishes))
        if window < 1:
            return []
        indices = tuple(self._to_send.popleft() for _ in range(window))
        self._heard()
        return [SendChunks(self._outbox.upload, indices)]

    def _window(self, publishes: int) -> int:
        """What the server's window leaves, given what is on its way to the broker."""
        if self._go is None:
            return publishes
        on_its_way = max(0, self._limits.inflight_max - publishes)
        return self._go.window - on_its_way

    def _receipt(self, ack: Ack) -> list[Effect]:
        if not self._is_ours(ack.upload) and not self._settled_before(ack):
            return []
        if ack.status in ("resend", "busy"):
            self._at_s, self._tries = self._now_s + ack.retry_after_s, 0
            self._to_send.clear()
            return []
        # Remembered first: a power cut between the two must not find an empty outbox in a
        # round that is still to be done.
        effects = self._remember(done=True)
        if ack.status == "accepted":
            self._accepted = ack.round
        return effects + self._leave(f"round {ack.round}: {ack.status} {ack.reason}".rstrip())

    def _settled_before(self, ack: Ack) -> bool:
        """Whether a join was answered with the receipt of an update that this disk lost."""
        final = ack.status in ("accepted", "rejected")
        return self.state is State.JOINING and ack.round == self.memory.round and final

    def _is_ours(self, upload: bytes) -> bool:
        uploading = self.state is State.UPLOADING and self._outbox is not None
        return uploading and self._outbox is not None and self._outbox.upload == upload

    def _heard(self) -> None:
        self._at_s, self._tries = self._now_s + SILENCE_S, 0

    # ── a model for this device's own programs ──────────────────────────────────────────

    def _keep_new(self, announcement: Announcement) -> list[Effect]:
        """The round that has an update of ours made a model: fetch it, though we train no more."""
        known = self._kept_version
        ours = announcement.round == self._accepted and self.role == "train"
        if known is None or announcement.model_version <= known or not ours or self._against:
            return []
        if self.state is not State.IDLE:
            return []
        self._announcement, self._keeping, self.state = announcement, True, State.FETCHING
        self._over_s = self._now_s + KEEP_S
        return self._fetch()

    def _keep(self, announcement: Announcement) -> list[Effect]:
        if self._kept_version is None or announcement.model_version <= self._kept_version:
            return []
        self._kept_version = announcement.model_version
        return [Keep(announcement.model_version, announcement.round)]

    # ── a device that holds its data out ────────────────────────────────────────────────

    def _evaluate_new(self, announcement: Announcement) -> list[Effect]:
        if self.role != "evaluate" or announcement.model_version <= self.memory.evaluated_version:
            return []
        present = self._announcement
        at_it = self.state in (State.FETCHING, State.EVALUATING)
        if at_it and present and present.model_version == announcement.model_version:
            return []
        if self._against:
            self._postponed, self.detail = announcement, self._against
            return []
        effects = self._leave("a newer model was announced")
        self._announcement, self.state = announcement, State.FETCHING
        return effects + self._fetch()

    def _evaluated(self, event: Evaluated) -> list[Effect]:
        announcement = self._announcement
        if self.state is not State.EVALUATING or announcement is None:
            return []
        if event.model_version != announcement.model_version:
            return []
        self.state = State.IDLE
        self._report = Report(
            round=announcement.round,
            model_version=event.model_version,
            examples=event.examples,
            metrics=event.metrics,
        )
        return [Send(self._report), *self._remember(evaluated_version=event.model_version)]

    def _report_again(self, announcement: Announcement) -> list[Effect]:
        """The server or the broker came back: our report may be lost with it."""
        report = self._report
        if report is None or report.model_version != announcement.model_version:
            return []
        return [Send(report)]


_ASKING = frozenset({State.JOINING, State.FETCHING, State.UPLOADING})
_WORKING = frozenset({State.FETCHING, State.TRAINING, State.SEALING, State.EVALUATING})
