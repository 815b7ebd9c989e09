"""A federation, seen from the device: the rules, and nothing but the rules.

Events go in, effects come out. Time comes in with each event; randomness comes in as
a function. What arrives here has already been verified by the agent, so a forged
message never becomes an event; what is stale, repeated or unasked for is ignored here.

A device has one duty at a time (`device_client.duties`), or none. This file says which begins:
a device that trains gets the round that is announced, and afterwards the model that came of it
if its own programs want that; a device in the role `evaluate` gets each model that it has not
measured. Whatever happens then is for the duty.
"""

from collections.abc import Callable
from typing import Literal

from broker_bridge.wire.lottery import drawn
from broker_bridge.wire.messages import Announcement, Init
from device_client.duties.duty import Duty
from device_client.duties.keeping import Keeping
from device_client.duties.measuring import Measuring
from device_client.duties.round import Round
from device_client.duties.standing import Standing, State
from device_client.events import (
    Announced,
    Discard,
    Effect,
    Eligible,
    Event,
    LinkDown,
    LinkUp,
    Memory,
    RenewalAsked,
    RenewalRefused,
    Renewed,
    Sealed,
    Send,
    Tick,
)
from device_client.renewing import SPREAD_S, Renewing

__all__ = ["Participant", "State"]


class Participant:
    """One device in a federation, one duty at a time."""

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
        yet; None: no model is kept for them. `draw`: uniform in [0, 1)."""
        self.role = role
        self._here = Standing(
            device=device, memory=memory, samples=samples, draw=draw, kept_version=kept_version
        )
        self._duty: Duty | None = None
        self._found: Init | None = None  # in the outbox at start, until its round is announced
        self._postponed: Announcement | None = None  # a model to measure when the rules allow it
        self._fleet_epochs = fleet_epochs  # whose keys we have
        self._renewing = Renewing(draw)
        self._sealed_news: Announced | None = None  # of a fleet key that we wait for

    # ── what others may ask and say ─────────────────────────────────────────────────────

    @property
    def state(self) -> State:
        """Where the device is in its duty; IDLE without one."""
        return State.IDLE if self._duty is None else self._duty.state

    @property
    def memory(self) -> Memory:
        """What must survive a power cut."""
        return self._here.memory

    @property
    def round(self) -> int:
        """The round the device is in, or the last one it saw."""
        return self._here.memory.round

    @property
    def fleet_epoch(self) -> int:
        """Which fleet key opens task and model of the round the device is in."""
        newest = max(self._fleet_epochs)
        return newest if self._duty is None else self._duty.announcement.fleet_epoch

    @property
    def detail(self) -> str:
        """Why things are as they are, for a person."""
        return self._here.detail

    @detail.setter
    def detail(self, sentence: str) -> None:
        self._here.detail = sentence

    @property
    def samples(self) -> int:
        """How many samples there are for the task at hand."""
        return self._here.samples

    @samples.setter
    def samples(self, count: int) -> None:
        self._here.samples = count

    # ── one step ────────────────────────────────────────────────────────────────────────

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do.

        Raises PeerError for what the server should not have sent; nothing has changed then.
        """
        match event:
            case Tick(now_s):
                self._here.now_s = max(self._here.now_s, now_s)
                return self._ask_for_renewal() + self._hand_on(event)
            case LinkUp():
                self._here.link, self._here.is_connected = event, True
                self._renewing.connected(self._here.now_s)
            case LinkDown():
                self._here.is_connected = False
            case Announced():
                return self._announced(event)
            case Sealed() if self.state is not State.SEALING:
                return self._found_sealed(event.init)
            case Eligible():
                return self._judged(event)
            case RenewalAsked(keys, spread_s):
                self._renewing.want(self._here.now_s, keys=keys, spread_s=spread_s)
            case Renewed():
                return self._renewed(event)
            case RenewalRefused(reason):
                self._here.detail = reason
                self._renewing.refused(self._here.now_s)
        return self._hand_on(event)

    def _hand_on(self, event: Event) -> list[Effect]:
        return [] if self._duty is None else self._after(self._duty.step(event))

    def _begin(self, duty: Duty) -> list[Effect]:
        self._duty = duty
        return self._after(duty.begin())

    def _after(self, effects: list[Effect]) -> list[Effect]:
        if self.state is State.IDLE:
            self._duty = None
        return effects

    def _leave(self, reason: str) -> list[Effect]:
        """Give up whatever the present round had us do."""
        effects = [] if self._duty is None else self._after(self._duty.give_up(reason))
        if self._found is not None:
            effects.append(Discard(self._found.upload))
            self._found = None
        self._here.detail = reason
        return effects

    # ── the announcement ────────────────────────────────────────────────────────────────

    def _announced(self, news: Announced) -> list[Effect]:
        announcement, memory = news.announcement, self._here.memory
        if announcement.round < memory.round:
            return []  # stale or replayed: rounds only grow
        if announcement.fleet_epoch not in self._fleet_epochs:
            return self._sealed_for_others(news)
        if announcement.state == "closed":
            return self._closed(announcement)
        if announcement.round == memory.round and news.digest != memory.digest:
            return []  # this round was opened otherwise: a round has one opening
        if isinstance(self._duty, Round) and self._duty.digest == news.digest:
            return self._hand_on(news)  # we are in it: heard again
        return self._opened(news)

    def _opened(self, news: Announced) -> list[Effect]:
        """A round is open that we have not begun in this life of the process."""
        announcement, digest = news.announcement, news.digest
        effects: list[Effect] = []
        if self._found is not None and self._found.announcement != digest:
            effects += [Discard(self._found.upload)]
            self._found = None
        if announcement.round > self._here.memory.round:
            if self.role == "train":
                effects += self._leave("a newer round was announced")
            effects += self._here.remember(round=announcement.round, digest=digest, done=False)
        if self.role == "evaluate":
            return effects + self._measure_new(announcement)
        if self._here.memory.done:
            return effects
        return effects + self._take_part(news)

    def _take_part(self, news: Announced) -> list[Effect]:
        announcement = news.announcement
        seed, threshold = announcement.lottery_seed, announcement.lottery_threshold
        if self._found is None and not drawn(seed, self._here.device, threshold):
            self._here.detail = f"not drawn for round {announcement.round}"
            return self._here.remember(done=True)
        found, self._found = self._found, None
        return self._begin(Round(self._here, news, found=found))

    def _closed(self, announcement: Announcement) -> list[Effect]:
        effects: list[Effect] = []
        memory = self._here.memory
        if announcement.round > memory.round or not memory.done:
            if self.role == "train":
                effects += self._leave("the round was closed")
            digest = memory.digest if announcement.round == memory.round else b""
            effects += self._here.remember(round=announcement.round, digest=digest, done=True)
        return effects + (
            self._measure_new(announcement)
            or self._report_again(announcement)
            or self._keep_new(announcement)
        )

    def _found_sealed(self, init: Init) -> list[Effect]:
        """An update is in the outbox that nobody is sealing now."""
        memory = self._here.memory
        if self._duty is None and not memory.done and init.announcement == memory.digest:
            self._found = init  # found at start; goes on when the round is announced again
            return []
        return [Discard(init.upload)]

    # ── models, beside those to train from ──────────────────────────────────────────────

    def _keep_new(self, announcement: Announcement) -> list[Effect]:
        """The round that has an update of ours made a model: fetch it, though we train no more."""
        known = self._here.kept_version
        ours = announcement.round == self._here.accepted and self.role == "train"
        if known is None or announcement.model_version <= known or not ours:
            return []
        if self._duty is not None or self._here.eligible.against:
            return []
        return self._begin(Keeping(self._here, announcement))

    def _measure_new(self, announcement: Announcement) -> list[Effect]:
        version = announcement.model_version
        if self.role != "evaluate" or version <= self._here.memory.evaluated_version:
            return []
        if self._duty is not None and self._duty.announcement.model_version == version:
            return []
        if self._here.eligible.against:
            self._postponed, self._here.detail = announcement, self._here.eligible.against
            return []
        effects = self._leave("a newer model was announced")
        return effects + self._begin(Measuring(self._here, announcement))

    def _report_again(self, announcement: Announcement) -> list[Effect]:
        """The server or the broker came back: our report may be lost with it."""
        report = self._here.report
        if report is None or report.model_version != announcement.model_version:
            return []
        return [Send(report)]

    # ── the owner's rules ───────────────────────────────────────────────────────────────

    def _judged(self, event: Eligible) -> list[Effect]:
        before, self._here.eligible = self._here.eligible, event
        if event.against:
            if isinstance(self._duty, Measuring):
                self._postponed = self._duty.announcement
            return self._hand_on(event)
        if not before.against and not before.network:
            return []
        effects = self._hand_on(event)
        postponed, self._postponed = self._postponed, None
        return effects + ([] if postponed is None else self._measure_new(postponed))

    # ── fleet keys, and our own ─────────────────────────────────────────────────────────

    def _sealed_for_others(self, news: Announced) -> list[Effect]:
        """Task and model are sealed under a fleet key that we have not."""
        announcement = news.announcement
        effects: list[Effect] = []
        if announcement.state == "closed" and self.role == "train":
            effects = self._closed(announcement)  # its end needs no key
        if announcement.fleet_epoch < max(self._fleet_epochs):
            self._here.detail = "this round is sealed under a fleet key from before our time"
            return effects
        self._here.detail = "the fleet key changed; asking the server for the new one"
        known, self._sealed_news = self._sealed_news, news
        anew = known is None or announcement.round > known.announcement.round
        spread_s = max(announcement.jitter_s, SPREAD_S)
        self._renewing.want(self._here.now_s, spread_s=spread_s, anew=anew)
        return effects

    def _ask_for_renewal(self) -> list[Effect]:
        if not self._here.is_connected:
            return []
        at_rest = self._duty is None and self._found is None
        return [*self._renewing.due(self._here.now_s, at_rest=at_rest)]

    def _renewed(self, event: Renewed) -> list[Effect]:
        """The server answered: take up what waited for it."""
        self._fleet_epochs = event.fleet_epochs
        self._renewing.done(keys=event.keys)
        if event.keys:
            self._found = None  # what our former keys sealed nobody can open
        effects = self._hand_on(event)
        news, self._sealed_news = self._sealed_news, None
        return effects + ([] if news is None else self._announced(news))
