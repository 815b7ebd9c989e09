"""Which duty a device has: whom an announcement concerns, what is stale, what survives."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.messages import Busy, Join, Need
from device_client.events import (
    Announced,
    Answered,
    Discard,
    Effect,
    Eligible,
    Evaluated,
    Event,
    Failed,
    Fetch,
    Fetched,
    Fetching,
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
from device_client.participant import Participant, State
from tests.device_client.rounds import (
    CHUNKS,
    FIRST,
    MODEL,
    ROUND,
    TASK,
    UPLOAD,
    at,
    closing,
    commit_for,
    device,
    go_for,
    kinds,
    need,
    opening,
    receipt,
)


def test_a_device_that_is_not_drawn_does_nothing_in_this_round() -> None:
    made = device()
    assert kinds(made.step(opening(lottery_threshold=0))) == [Remember, Remember]
    assert made.state is State.IDLE
    assert made.memory.done
    assert made.detail == "not drawn for round 1"


def test_joins_are_spread_over_the_jitter() -> None:
    made = Participant("ward-3", memory=Memory(), samples=5, fleet_epochs=FIRST, draw=lambda: 0.5)
    made.step(Tick(100.0))
    announced = opening(jitter_s=20.0)
    assert kinds(made.step(announced)) == [Remember]
    assert made.state is State.WAITING
    assert made.step(Tick(109.9)) == []
    assert kinds(made.step(Tick(110.0))) == [Send]


# ── Stale, repeated, contradicting ──────────────────────────────────────────────────────


@pytest.mark.parametrize("state", list(State)[2:7])
def test_the_retained_announcement_again_changes_nothing(state: State) -> None:
    made = at(state)
    assert made.step(ROUND) == []
    assert made.state is state


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_a_replayed_announcement_is_ignored(role: str, done: bool) -> None:
    made = device(Memory(round=5, digest=b"x" * 32, done=done), role=role)
    for stale in (opening(4), closing(4), opening(1)):
        assert made.step(stale) == []
    assert made.state is State.IDLE
    assert made.memory.round == 5


def test_a_round_has_one_opening() -> None:
    made = at(State.TRAINING)
    assert made.step(opening(1, deadline_s=1.0)) == []
    assert made.state is State.TRAINING


def test_a_round_that_is_done_is_not_begun_again_after_a_reboot() -> None:
    made = device(Memory(round=1, digest=ROUND.digest, done=True))
    assert made.step(ROUND) == []
    assert made.state is State.IDLE


def test_a_go_for_another_announcement_is_ignored() -> None:
    made = at(State.JOINING)
    assert made.step(go_for(opening(1, deadline_s=1.0))) == []
    assert made.state is State.JOINING


def test_a_go_that_comes_twice_is_taken_once() -> None:
    made = at(State.TRAINING)
    assert made.step(go_for(ROUND, b"another!")) == []
    (seal,) = made.step(Trained(1))
    assert seal.go.upload == UPLOAD


def test_a_model_that_was_not_announced_is_not_trained_on() -> None:
    made = at(State.FETCHING)
    made.step(Fetched("task", TASK.digest))
    assert made.step(Fetched("model", b"x" * 32)) == []
    assert made.state is State.FETCHING


def test_a_receipt_for_another_upload_changes_nothing() -> None:
    made = at(State.UPLOADING)
    assert made.step(receipt("accepted", b"another!")) == []
    assert made.state is State.UPLOADING


def test_a_newer_round_ends_the_present_one() -> None:
    made = at(State.TRAINING)
    effects = made.step(opening(2))
    assert kinds(effects) == [Stop, Remember, Send]
    assert made.memory.round == 2


def test_a_closed_round_is_left() -> None:
    made = at(State.UPLOADING)
    effects = made.step(closing())
    assert Discard(UPLOAD) in effects
    assert made.state is State.IDLE
    assert made.memory == Memory(round=1, digest=ROUND.digest, done=True)
    assert made.step(need(1)) == []
    assert made.step(Room(9)) == []


def test_training_that_ends_after_its_round_is_thrown_away() -> None:
    made = at(State.TRAINING)
    made.step(opening(2))
    assert made.step(Trained(1)) == []


def test_an_update_that_was_sealed_too_late_is_thrown_away() -> None:
    made = at(State.SEALING)
    made.step(closing())
    assert made.step(Sealed(commit_for(ROUND))) == [Discard(UPLOAD)]


# ── A power cut ─────────────────────────────────────────────────────────────────────────


def test_a_reboot_in_mid_upload_goes_on_with_the_same_upload() -> None:
    memory = at(State.UPLOADING).memory
    made = device(memory)
    commit = commit_for(ROUND)
    assert made.step(Sealed(commit)) == []
    assert made.step(ROUND) == [Send(commit)]
    made.step(need(6))
    assert made.step(Room(9)) == [SendChunks(UPLOAD, (6,))]


def test_a_reboot_while_training_joins_again() -> None:
    made = device(at(State.TRAINING).memory)
    assert kinds(made.step(ROUND)) == [Send]
    assert made.state is State.JOINING


def test_an_outbox_of_a_round_that_is_over_is_emptied() -> None:
    made = device(at(State.UPLOADING).memory)
    made.step(Sealed(commit_for(ROUND)))
    assert made.step(opening(2))[0] == Discard(UPLOAD)
    assert made.state is State.JOINING


def test_an_outbox_of_a_round_that_closed_meanwhile_is_emptied() -> None:
    made = device(at(State.UPLOADING).memory)
    made.step(Sealed(commit_for(ROUND)))
    assert Discard(UPLOAD) in made.step(closing())


def test_an_outbox_whose_round_is_done_is_emptied_at_once() -> None:
    made = device(Memory(round=1, digest=ROUND.digest, done=True))
    assert made.step(Sealed(commit_for(ROUND))) == [Discard(UPLOAD)]


def test_an_outbox_is_emptied_by_a_device_that_trains_no_longer() -> None:
    made = device(at(State.UPLOADING).memory, role="evaluate")
    made.step(Sealed(commit_for(ROUND)))
    assert made.step(opening(2))[0] == Discard(UPLOAD)


# ── Any event in any state ──────────────────────────────────────────────────────────────


OPENINGS = [opening(n, deadline_s=d) for n in (1, 2, 3) for d in (600.0, 30.0)]
CLOSINGS = [closing(n, model_version=n + 1) for n in (1, 2, 3)]
UPLOADS = [UPLOAD, b"upload-2"]
numbers = st.integers(0, 4)
uploads = st.sampled_from(UPLOADS)
blobs = st.sampled_from([TASK.digest, MODEL.digest, b"?" * 32])

any_event = st.one_of(
    st.floats(0, 5000).map(Tick),
    st.builds(LinkUp, st.sampled_from([0, 8192]), st.integers(0, 20)),
    st.just(LinkDown()),
    st.sampled_from(OPENINGS + CLOSINGS),
    st.builds(go_for, st.sampled_from(OPENINGS), uploads),
    st.builds(
        lambda n, s: Answered(Busy(round=n, retry_after_s=s)), numbers, st.sampled_from([-1, 0, 9])
    ),
    st.builds(lambda u, b: Answered(Need(upload=u, bitmap=b)), uploads, st.binary(max_size=2)),
    st.builds(
        receipt,
        st.sampled_from(["accepted", "resend", "rejected", "late", "busy"]),
        uploads,
        numbers,
    ),
    st.builds(Fetched, st.sampled_from(["task", "model"]), blobs),
    st.just(Fetching()),
    st.builds(Trained, numbers),
    st.builds(Evaluated, numbers, st.integers(1, 9), st.just({})),
    st.builds(Failed, numbers, st.just("no")),
    st.builds(lambda a, u: Sealed(commit_for(a, u)), st.sampled_from(OPENINGS), uploads),
    st.builds(Room, st.integers(0, 20)),
    st.builds(RenewalAsked, st.booleans(), st.floats(0, 60)),
    st.builds(Renewed, st.sets(st.integers(1, 3), min_size=1).map(frozenset)),
    st.builds(RenewalRefused, st.just("no")),
    st.sampled_from([Eligible(), Eligible("hot"), Eligible("metered", "metered")]),
)


def what_would_help(made: Participant, now_s: float, last: Announced | None, given: bytes) -> list:
    """The events that take the round forward from here, so that chance gets far."""
    if last is None or made.state is State.IDLE:
        return OPENINGS
    return {
        State.WAITING: [Tick(now_s + 60)],
        State.JOINING: [go_for(last, u) for u in UPLOADS],
        State.FETCHING: [Fetched("task", TASK.digest), Fetched("model", MODEL.digest)],
        State.TRAINING: [Trained(made.round)],
        State.SEALING: [Sealed(commit_for(last, given))],
        State.UPLOADING: [need(1, 3), Room(2), Room(2), receipt("accepted", number=made.round)],
        State.EVALUATING: [Evaluated(n, 5, {}) for n in (1, 2, 3, 4)],
    }[made.state]


class Witness:
    """What a device was told so far, and whether what it does may follow from that."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.now_s = 0.0
        self.last: Announced | None = None  # the round it is in, or was in last
        self.given = UPLOAD  # the upload id of its last `go`
        self.asked_for: dict[bytes, set[int]] = {}
        self.sealed: list[int] = []

    def hear(self, event: Event, memory: Memory) -> None:
        match event:
            case Tick(now_s):
                self.now_s = max(self.now_s, now_s)
            case Announced() if event.digest == memory.digest:
                self.last = event
            case Answered(Need(upload=upload, bitmap=bitmap)):
                bits = bitmap[0] if bitmap else 0
                asked = {i for i in range(CHUNKS) if bits >> i & 1}
                self.asked_for.setdefault(upload, set()).update(asked)

    def watch(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, get_args(Effect))
            match effect:
                case SendChunks(upload, indices):
                    assert set(indices) <= self.asked_for.get(upload, set()), "nobody asked for it"
                case Seal(announcement, _, go):
                    assert self.role == "train"
                    self.sealed.append(announcement.round)
                    self.given = go.upload
                case Train() | Send(message=Join()):
                    assert self.role == "train"
        assert len(self.sealed) == len(set(self.sealed)), "one update for one round"


def check_memory(before: Memory, after: Memory, effects: list[Effect]) -> None:
    """What a device remembers only grows, and is written down before it is acted on."""
    assert after.round >= before.round, "rounds only grow"
    assert after.round > before.round or after.done >= before.done
    assert after.evaluated_version >= before.evaluated_version
    if after != before:
        assert [e.memory for e in effects if isinstance(e, Remember)][-1] == after
    if after.round > before.round:
        begun = next(i for i, e in enumerate(effects) if isinstance(e, Remember))
        acts = [i for i, e in enumerate(effects) if isinstance(e, Send | Fetch | Train)]
        assert all(i > begun for i in acts), "remembered before it is acted on"


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["train", "evaluate"]), st.sampled_from([None, 0]))
def test_any_event_in_any_state_gives_legal_effects_or_a_peer_error(data, role, kept) -> None:
    draws = data.draw(st.randoms(use_true_random=False))
    made = Participant(
        "ward-3", memory=Memory(), samples=5, role=role, fleet_epochs=frozenset({1}),
        kept_version=kept, draw=draws.random,
    )  # fmt: skip
    witness = Witness(role)
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.integers(0, 2)):
            helpful = what_would_help(made, witness.now_s, witness.last, witness.given)
            event = data.draw(st.sampled_from(helpful))
        else:
            event = data.draw(any_event)
        before = made.memory
        try:
            effects = made.step(event)
        except PeerError:
            assert made.memory == before
            continue
        witness.hear(event, made.memory)
        witness.watch(effects)
        check_memory(before, made.memory, effects)
