"""One open round, seen from a device that trains: from its announcement to the receipt.

begin ─► WAITING ─ jitter over ─► JOINING ─ go ─► FETCHING ─ task and model here ─►
TRAINING ─ trained ─► SEALING ─ in the outbox ─► UPLOADING ─ receipt ─► IDLE
"""

from broker_bridge.wire.messages import Ack, Busy, Go, Init, Join, Need
from device_client.duties.duty import Duty
from device_client.duties.sending import Sending
from device_client.duties.standing import Standing, State
from device_client.events import (
    Announced,
    Answered,
    Discard,
    Effect,
    Eligible,
    Event,
    Failed,
    LinkUp,
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

__all__ = ["Round"]


class Round(Duty):
    """This device's part in a round. It ends with a receipt, with the deadline, or in silence."""

    def __init__(self, here: Standing, opened: Announced, *, found: Init | None = None) -> None:
        """`found`: the update of this round that was in the outbox at start."""
        super().__init__(here, opened.announcement)
        self.digest = opened.digest
        self._over_s = here.now_s + opened.announcement.deadline_s
        self._go: Go | None = None
        self._sending = None if found is None else Sending(found, None)

    def begin(self) -> list[Effect]:
        """Join after a while, so that a fleet does not come at once; or go on with the upload."""
        if self._sending is not None:
            return self._upload()
        self.state = State.WAITING
        self._wait_for_our_turn()
        return self.step(Tick(self._here.now_s))

    def give_up(self, reason: str) -> list[Effect]:
        """End it; an update that is in the outbox is of no use then."""
        effects = super().give_up(reason)
        if self._sending is not None:
            effects.append(Discard(self._sending.init.upload))
            self._sending = None
        return effects

    def step(self, event: Event) -> list[Effect]:
        """Take one event, change, and say what to do.

        Raises PeerError for what the server should not have sent; nothing has changed then.
        """
        match event:
            case Tick() if self._here.now_s >= self._over_s:
                return self._sit_out("the round's deadline is over")
            case Tick() if self.state is not State.FETCHING:
                return self._tick()
            case LinkUp() if self.state is not State.FETCHING:
                return self._connected_again()
            case Announced(announcement):
                return self._announced_again(announcement.jitter_s)
            case Answered(message):
                return self._answered(message)
            case Trained(number):
                return self._trained(number)
            case Sealed(init):
                return self._sealed(init)
            case Room(publishes):
                return self._send_some(publishes)
            case Failed(number, reason):
                return self._failed(number, reason)
            case Eligible(against):
                return self._give_way() if against else self._go_on()
            case Renewed(keys=True) if self.state is State.UPLOADING:
                return self._begin_anew()  # what our former keys sealed nobody can open
        return self._fetch_on(event) if self.state is State.FETCHING else []

    # ── time ────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> list[Effect]:
        if not self._asking.is_due:
            return []
        if self.state is State.WAITING:
            return self._begin_joining()
        if self._sending is not None and self._sending.is_asked_for:
            return []  # its chunks go, or will when there is room: nothing to ask
        return self._ask()

    def _wait_for_our_turn(self) -> None:
        self._asking.wait(self._here.draw() * self.announcement.jitter_s)

    def _begin_joining(self) -> list[Effect]:
        if self._here.eligible.against:
            self._here.detail = self._here.eligible.against
            return []
        self.state = State.JOINING
        self._asking.anew()
        return self._ask()

    def _ask(self) -> list[Effect]:
        """Ask what this state waits for an answer to; for the last time, give up."""
        question = self._question()
        if question is None or not self._here.is_connected:
            return []  # a broker that is away is no server that is silent: asked at LinkUp
        if self._asking.in_vain:
            return self._sit_out("the server did not answer")
        self._asking.asked()
        return [Send(question)]

    def _question(self) -> Join | Init | None:
        if self.state is State.JOINING:
            return self._join()
        if self.state is not State.UPLOADING or self._sending is None:
            return None
        if self._here.eligible.network:
            return None  # asked when the owner's rules allow it
        return self._sending.init

    def _connected_again(self) -> list[Effect]:
        self._asking.anew()
        match self.state:
            case State.JOINING:
                return self._ask()
            case State.UPLOADING:
                return self._upload()
        return []

    def _announced_again(self, jitter_s: float) -> list[Effect]:
        """The server or the broker came back: what we asked for last may be lost with it."""
        if self.state in (State.JOINING, State.UPLOADING):
            self._asking.soon(jitter_s)
        return []

    # ── the owner's rules ───────────────────────────────────────────────────────────────

    def _give_way(self) -> list[Effect]:
        """Stop at the next step. What is sealed is sent, unless the network is the reason."""
        if self.state in (State.SEALING, State.UPLOADING):
            return []
        against = self._here.eligible.against
        at_work = self.state in (State.FETCHING, State.TRAINING)
        self.state, self._here.detail = State.WAITING, against
        return [Stop(against)] if at_work else []

    def _go_on(self) -> list[Effect]:
        """Nothing is against it any more. Many devices may hear that at one hour: spread them."""
        if self.state is State.WAITING:
            self._here.detail = ""
            self._wait_for_our_turn()
        if self.state is State.UPLOADING:
            self._asking.anew()
            return self._ask()
        return []

    # ── what the server answers ─────────────────────────────────────────────────────────

    def _join(self) -> Join:
        return Join(
            round=self.announcement.round,
            announcement=self.digest,
            samples=self._here.samples,
            packet_bytes_max=self._here.link.packet_bytes_max,
            inflight_max=self._here.link.inflight_max,
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
        if self.state is not State.JOINING or go.announcement != self.digest:
            return []
        self._go = go
        return self._begin_fetching()

    def _told_to_wait(self, busy: Busy) -> list[Effect]:
        if self.state is not State.JOINING or busy.round != self._here.memory.round:
            return []
        if busy.retry_after_s < 0:
            return self._sit_out(busy.reason)
        self.state, self._here.detail = State.WAITING, busy.reason
        self._asking.wait(busy.retry_after_s * (1 + 0.25 * self._here.draw()))
        return []

    def _needed(self, need: Need) -> list[Effect]:
        sending = self._our(need.upload)
        if sending is not None:
            sending.need(need)
            self._asking.heard()
        return []

    def _receipt(self, ack: Ack) -> list[Effect]:
        sending = self._our(ack.upload)
        if sending is None and not self._settled_before(ack):
            return []
        if sending is not None and ack.status in ("resend", "busy"):
            sending.hold()
            self._asking.anew()
            self._asking.wait(ack.retry_after_s)
            return []
        # Remembered first: a power cut between the two must not find an empty outbox in a
        # round that is still to be done.
        effects = self._here.remember(done=True)
        if ack.status == "accepted":
            self._here.accepted = ack.round
        return effects + self.give_up(f"round {ack.round}: {ack.status} {ack.reason}".rstrip())

    def _settled_before(self, ack: Ack) -> bool:
        """Whether a join was answered with the receipt of an update that this disk lost."""
        final = ack.status in ("accepted", "rejected")
        return self.state is State.JOINING and ack.round == self._here.memory.round and final

    def _our(self, upload: bytes) -> Sending | None:
        """The update that we are sending, if this is its id."""
        if self.state is not State.UPLOADING or self._sending is None:
            return None
        return self._sending if self._sending.init.upload == upload else None

    # ── training and sealing ────────────────────────────────────────────────────────────

    def _act(self) -> list[Effect]:
        self.state = State.TRAINING
        train = Train(self.announcement.round, self.announcement.settings)
        return [train, *self._here.keep(self.announcement)]

    def _trained(self, number: int) -> list[Effect]:
        if self.state is not State.TRAINING or number != self._here.memory.round:
            return []
        assert self._go is not None  # noqa: S101 - TRAINING implies it
        self.state = State.SEALING
        return [Seal(self.announcement, self.digest, self._go)]

    def _sealed(self, init: Init) -> list[Effect]:
        if self.state is not State.SEALING or init.announcement != self.digest:
            return [Discard(init.upload)]
        self._sending = Sending(init, self._go)
        return self._upload()

    # ── the upload ──────────────────────────────────────────────────────────────────────

    def _upload(self) -> list[Effect]:
        self.state = State.UPLOADING
        self._asking.anew()
        assert self._sending is not None  # noqa: S101 - UPLOADING implies it
        if self._sending.is_too_large(self._here.link):
            return self._begin_anew()
        return self._ask()  # the commit first; the answer says which chunks to send

    def _begin_anew(self) -> list[Effect]:
        """Give up this attempt and join again: what is sealed is never cut another way."""
        assert self._sending is not None  # noqa: S101 - UPLOADING implies it
        given_up = Discard(self._sending.init.upload)
        self._sending, self.state = None, State.JOINING
        return [given_up, *self._ask()]

    def _send_some(self, publishes: int) -> list[Effect]:
        if self.state is not State.UPLOADING or self._sending is None:
            return []
        if self._here.eligible.network:
            return []
        indices = self._sending.next(self._here.link, publishes)
        if not indices:
            return []
        self._asking.heard()
        return [SendChunks(self._sending.init.upload, indices)]
