"""A round, seen from the device, transition by transition."""

import hashlib
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.chunks import bitmap_of
from broker_bridge.wire.lottery import EVERYONE
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
    Settings,
)
from device_client.duties.asking import SILENCE_S, TRIES_MAX
from device_client.events import (
    Announced,
    Answered,
    Discard,
    Effect,
    Eligible,
    Evaluate,
    Evaluated,
    Failed,
    Fetch,
    Fetched,
    Fetching,
    LinkDown,
    LinkUp,
    Memory,
    Remember,
    Renew,
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

TASK = Blob(digest=b"t" * 32, total_bytes=5000, body_bytes=1000)
MODEL = Blob(digest=b"m" * 32, total_bytes=4000, body_bytes=1000)
UPLOAD = b"upload-1"
CHUNKS = 7
FIRST = frozenset({1})  # the fleet keys of a device that enrolled in the first epoch


def opening(number: int = 1, **changes) -> Announced:
    """The announcement of an open round, as the agent hands it over."""
    announcement = Announcement(
        **{
            "federation": "demo",
            "round": number,
            "state": "open",
            "task": TASK,
            "task_name": "wearables",
            "model": MODEL,
            "model_version": number,
            "settings": Settings(epochs=1, learning_rate=0.1),
            "delta_bound": 10.0,
            "weight_max": 100,
            "fraction_bits": 32,
            "round_key": b"k" * 32,
            "fleet_epoch": 1,
            "issued_at": 0.0,
            "deadline_s": 600.0,
            "target": 2,
            "quorum": 1,
            "lottery_seed": b"s" * 32,
            "lottery_threshold": EVERYONE,
        }
        | changes
    )
    return Announced(announcement, hashlib.sha256(repr(announcement).encode()).digest())


def closing(number: int = 1, **changes) -> Announced:
    return opening(number, state="closed", **changes)


def go_for(announced: Announced, upload: bytes = UPLOAD) -> Answered:
    return Answered(
        Go(
            round=announced.announcement.round,
            announcement=announced.digest,
            upload=upload,
            shard=0,
            packet_bytes=2048,
            window=20,
        )
    )


def commit_for(announced: Announced, upload: bytes = UPLOAD) -> Init:
    return Init(
        round=announced.announcement.round,
        announcement=announced.digest,
        upload=upload,
        enc=b"e" * 32,
        total_bytes=CHUNKS * 1000,
        body_bytes=1000,
        tags=b"g" * 32,
        examples=10,
        train_s=1.0,
    )


def need(*indices: int, upload: bytes = UPLOAD) -> Answered:
    return Answered(Need(upload=upload, bitmap=bitmap_of(indices, CHUNKS)))


def receipt(status: str, upload: bytes = UPLOAD, number: int = 1, **changes) -> Answered:
    return Answered(Ack(round=number, upload=upload, status=status, **changes))


def device(memory: Memory | None = None, **options) -> Participant:
    """A device that knows nothing yet, without jitter, one second after its start."""
    made = Participant(
        "ward-3",
        memory=memory or Memory(),
        samples=5,
        **{"fleet_epochs": FIRST, "draw": lambda: 0.0} | options,
    )
    made.step(Tick(1.0))
    made.step(LinkUp(8192, 20))
    return made


ROUND = opening()


def at(state: State, announced: Announced = ROUND) -> Participant:
    """A device in the middle of a round."""
    made = device()
    steps = {
        State.JOINING: [announced],
        State.FETCHING: [go_for(announced)],
        State.TRAINING: [Fetched("task", TASK.digest), Fetched("model", MODEL.digest)],
        State.SEALING: [Trained(announced.announcement.round)],
        State.UPLOADING: [Sealed(commit_for(announced))],
    }
    for name, events in steps.items():
        for event in events:
            made.step(event)
        if name is state:
            break
    assert made.state is state
    return made


def kinds(effects) -> list[type]:
    return [type(effect) for effect in effects]


# ── A round from end to end ─────────────────────────────────────────────────────────────


def test_a_round_goes_from_announcement_to_receipt() -> None:
    made = device()
    effects = made.step(ROUND)
    assert effects == [
        Remember(Memory(round=1, digest=ROUND.digest)),
        Send(Join(round=1, announcement=ROUND.digest, samples=5, packet_bytes_max=8192,
                  inflight_max=20)),
    ]  # fmt: skip
    assert made.step(go_for(ROUND)) == [Fetch("task", TASK)]
    assert made.step(Fetched("task", TASK.digest)) == [Fetch("model", MODEL)]
    assert made.step(Fetched("model", MODEL.digest)) == [Train(1, ROUND.announcement.settings)]
    (seal,) = made.step(Trained(1))
    assert isinstance(seal, Seal)
    assert (seal.digest, seal.go.upload) == (ROUND.digest, UPLOAD)
    commit = commit_for(ROUND)
    assert made.step(Sealed(commit)) == [Send(commit)]
    assert made.step(need(*range(CHUNKS))) == []
    assert made.step(Room(4)) == [SendChunks(UPLOAD, (0, 1, 2, 3))]
    assert made.step(Room(4)) == [SendChunks(UPLOAD, (4, 5, 6))]
    assert made.step(Room(4)) == []
    assert made.step(receipt("accepted")) == [
        Remember(Memory(round=1, digest=ROUND.digest, done=True)),
        Discard(UPLOAD),
    ]
    assert made.state is State.IDLE


def test_a_second_round_needs_the_task_no_second_time() -> None:
    made = at(State.UPLOADING)
    made.step(receipt("accepted"))
    made.step(closing(model_version=2))
    second = opening(2)
    made.step(second)
    assert made.step(go_for(second)) == [Fetch("model", MODEL)]


def test_the_round_is_remembered_before_anything_is_said() -> None:
    effects = device().step(ROUND)
    assert kinds(effects) == [Remember, Send]


def test_no_chunk_is_sent_that_the_server_did_not_ask_for() -> None:
    made = at(State.UPLOADING)
    assert made.step(Room(100)) == []
    made.step(need(2, 5))
    assert made.step(Room(100)) == [SendChunks(UPLOAD, (2, 5))]
    assert made.step(Room(100)) == []


def test_no_chunk_is_sent_for_another_upload() -> None:
    made = at(State.UPLOADING)
    made.step(need(1, 2, upload=b"another!"))
    assert made.step(Room(100)) == []


def test_a_bitmap_of_the_wrong_length_is_the_servers_fault() -> None:
    with pytest.raises(PeerError):
        at(State.UPLOADING).step(Answered(Need(upload=UPLOAD, bitmap=b"\xff" * 9)))


# ── Whom it concerns ────────────────────────────────────────────────────────────────────


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


# ── Renewing ────────────────────────────────────────────────────────────────────────────


def asked(made: Participant, now_s: float) -> list[Any]:
    return [e for e in made.step(Tick(now_s)) if isinstance(e, Renew)]


def test_a_round_under_a_new_fleet_key_is_begun_once_the_key_is_here() -> None:
    made = device()
    assert made.step(opening(fleet_epoch=2)) == []
    assert "fleet key" in made.detail
    assert made.memory == Memory()
    assert asked(made, 0.0) == [Renew(keys=False, attempt=1)]
    begun = made.step(Renewed(frozenset({1, 2})))
    assert kinds(begun) == [Remember, Send]
    assert made.state is State.JOINING
    assert asked(made, 1e6) == []


def test_a_fleet_that_hears_of_a_new_key_does_not_ask_in_one_moment() -> None:
    made = Participant("ward-3", memory=Memory(), samples=5, fleet_epochs=FIRST, draw=lambda: 0.5)
    made.step(Tick(100.0))
    made.step(opening(fleet_epoch=2, jitter_s=20.0))
    assert asked(made, 109.9) == []
    assert len(asked(made, 110.0)) == 1


def test_a_question_is_asked_again_ever_more_slowly_and_for_ever() -> None:
    made, times = device(), []
    made.step(opening(fleet_epoch=2))
    for now_s in range(100_000):
        times += [now_s] * len(asked(made, float(now_s)))
    gaps = [b - a for a, b in pairwise(times)]
    assert gaps[:3] == [9, 15, 30]
    assert gaps == sorted(gaps)
    assert set(gaps[8:]) == {450}


def test_a_device_without_a_connection_does_not_ask_and_asks_soon_after() -> None:
    made = device()
    made.step(opening(fleet_epoch=2))
    made.step(LinkDown())
    assert asked(made, 50.0) == []
    made.step(LinkUp(0, 20))
    assert len(asked(made, 50.0)) == 1


def test_a_round_under_an_older_fleet_key_that_is_still_here_goes_on() -> None:
    made = device(fleet_epochs=frozenset({1, 2}))
    assert kinds(made.step(opening(fleet_epoch=1))) == [Remember, Send]
    assert made.fleet_epoch == 1


def test_a_round_under_a_fleet_key_from_before_our_time_is_sat_out_in_silence() -> None:
    made = device(fleet_epochs=frozenset({2}))
    assert made.step(opening(fleet_epoch=1)) == []
    assert asked(made, 1e6) == []
    assert made.memory == Memory()


def test_the_end_of_a_round_needs_no_key() -> None:
    made = device()
    made.step(opening())
    effects = made.step(closing(fleet_epoch=2))
    assert made.state is State.IDLE
    assert made.memory.done
    assert Remember in kinds(effects)
    assert len(asked(made, 2.0)) == 1


def test_new_keys_are_offered_by_a_device_at_rest_only() -> None:
    made = device()
    made.step(RenewalAsked(keys=True))
    assert asked(made, 0.0) == [Renew(keys=True, attempt=1)]
    made.step(opening())
    assert asked(made, 1e3) == [Renew(keys=False, attempt=2)]


def test_new_keys_that_were_wanted_are_wanted_until_they_hold() -> None:
    made = device()
    made.step(RenewalAsked(keys=True))
    made.step(Renewed(frozenset({1})))
    assert asked(made, 1e3) == [Renew(keys=True, attempt=1)]
    made.step(Renewed(frozenset({1}), keys=True))
    assert asked(made, 1e6) == []


def test_an_update_that_old_keys_sealed_is_given_up_when_new_keys_hold() -> None:
    made = at(State.UPLOADING)
    effects = made.step(Renewed(frozenset({1}), keys=True))
    assert effects[0] == Discard(UPLOAD)
    assert kinds(effects) == [Discard, Send]
    assert made.state is State.JOINING


def test_a_refusal_is_shown_and_asked_about_again_much_later_or_in_the_next_round() -> None:
    made = device()
    made.step(opening(fleet_epoch=2))
    assert len(asked(made, 0.0)) == 1
    made.step(RenewalRefused("the device is suspended"))
    assert made.detail == "the device is suspended"
    made.step(opening(fleet_epoch=2))
    assert asked(made, 600.0) == []
    made.step(opening(2, fleet_epoch=2))
    assert len(asked(made, 602.0)) == 1
    made.step(RenewalRefused("the device is suspended"))
    assert len(asked(made, 602.0 + 4500.0)) == 1


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


# ── Silence, and answers that are not final ─────────────────────────────────────────────


@pytest.mark.parametrize(
    ("state", "asked"),
    [(State.JOINING, Join), (State.FETCHING, NeedBlob), (State.UPLOADING, Init)],
)
def test_what_got_no_answer_is_asked_again(state: State, asked: type) -> None:
    made = at(state)
    assert made.step(Tick(1.0 + SILENCE_S / 2)) == []
    (effect,) = made.step(Tick(1.0 + 2 * SILENCE_S))
    assert isinstance(effect.message, asked)


def test_chunks_that_come_in_keep_a_fetch_from_asking() -> None:
    made = at(State.FETCHING)
    made.step(Tick(9.0))
    made.step(Fetching())
    assert made.step(Tick(9.0 + SILENCE_S / 2)) == []
    assert kinds(made.step(Tick(10.0 + 2 * SILENCE_S))) == [Send]


def test_a_new_connection_asks_at_once() -> None:
    assert kinds(at(State.UPLOADING).step(LinkUp(8192, 20))) == [Send]


def test_an_announcement_heard_again_asks_soon_for_the_server_or_broker_was_away() -> None:
    made = at(State.UPLOADING)
    assert made.step(ROUND) == []
    assert made.step(Tick(1.9)) == [], "not at once: whoever repeats it must not make us shout"
    assert made.step(Tick(2.0)) == [Send(commit_for(ROUND))]


def test_a_broker_that_is_away_for_long_costs_no_update() -> None:
    made = at(State.UPLOADING)
    made.step(LinkDown())
    for now_s in range(2, 590):
        assert made.step(Tick(float(now_s))) == []
    assert made.state is State.UPLOADING
    assert made.step(LinkUp(8192, 20)) == [Send(commit_for(ROUND))]


def test_many_reconnects_cost_no_update() -> None:
    made = at(State.UPLOADING)
    for _ in range(2 * TRIES_MAX):
        assert made.step(LinkUp(8192, 20)) == [Send(commit_for(ROUND))]
    assert made.state is State.UPLOADING


def test_an_update_cut_for_larger_packets_than_the_broker_takes_now_is_made_anew() -> None:
    made = at(State.UPLOADING)
    discard, join = made.step(LinkUp(1100, 20))
    assert discard == Discard(UPLOAD)
    assert isinstance(join.message, Join)
    assert join.message.packet_bytes_max == 1100
    assert made.step(go_for(ROUND, b"upload-2")) == [Fetch("model", MODEL)]
    made.step(Fetched("model", MODEL.digest))
    assert kinds(made.step(Trained(1))) == [Seal]


def test_a_new_connection_does_not_begin_a_fetch_from_the_start() -> None:
    """On a line that breaks every few seconds it would never come to its end."""
    made = at(State.FETCHING)
    assert made.step(LinkUp(8192, 20)) == []
    assert made.step(ROUND) == []
    assert made.step(Tick(1.0 + SILENCE_S - 0.1)) == []
    assert kinds(made.step(Tick(1.0 + SILENCE_S))) == [Send]


def test_a_server_that_never_answers_is_given_up() -> None:
    made = at(State.JOINING, opening(deadline_s=1e9))
    now, sent = 1.0, 0
    while made.state is State.JOINING:
        now += 2 * SILENCE_S
        sent += kinds(made.step(Tick(now))).count(Send)
        assert sent <= TRIES_MAX
    assert made.memory.done
    assert made.detail == "the server did not answer"


def test_the_deadline_ends_the_round_on_the_device_too() -> None:
    made = at(State.TRAINING)
    assert made.step(Tick(600.0)) == []
    assert kinds(made.step(Tick(601.0))) == [Stop, Remember]
    assert made.state is State.IDLE


def test_busy_means_later() -> None:
    made = at(State.JOINING)
    made.step(Answered(Busy(round=1, retry_after_s=30.0, reason="the cohort is full")))
    assert made.detail == "the cohort is full"
    assert made.step(Tick(30.0)) == []
    assert kinds(made.step(Tick(31.0))) == [Send]


def test_busy_with_a_negative_time_means_not_in_this_round() -> None:
    made = at(State.JOINING)
    made.step(Answered(Busy(round=1, retry_after_s=-1, reason="not open")))
    assert made.state is State.IDLE
    assert made.memory.done


def test_busy_in_another_round_says_nothing_here() -> None:
    made = at(State.JOINING)
    assert made.step(Answered(Busy(round=9, retry_after_s=-1))) == []
    assert made.state is State.JOINING


@pytest.mark.parametrize("status", ["resend", "busy"])
def test_a_receipt_that_is_not_final_keeps_the_update(status: str) -> None:
    made = at(State.UPLOADING)
    made.step(need(*range(CHUNKS)))
    assert made.step(receipt(status, retry_after_s=3.0)) == []
    assert made.step(Room(9)) == []
    assert made.step(Tick(3.9)) == []
    assert made.step(Tick(4.0)) == [Send(commit_for(ROUND))]


def test_a_server_that_is_busy_for_long_is_not_a_silent_one() -> None:
    made = at(State.UPLOADING, opening(deadline_s=1e9))
    now = 1.0
    for _ in range(3 * TRIES_MAX):
        made.step(receipt("busy", retry_after_s=3.0))
        now += 3.0
        assert kinds(made.step(Tick(now))) == [Send]


@pytest.mark.parametrize("status", ["accepted", "rejected", "late"])
def test_a_final_receipt_ends_the_round(status: str) -> None:
    made = at(State.UPLOADING)
    effects = made.step(receipt(status, reason="so it is"))
    # In this order: a power cut between the two must not look like a round still to be done.
    assert kinds(effects) == [Remember, Discard]
    assert made.memory.done
    assert status in made.detail


def test_a_join_answered_with_a_receipt_ends_the_round() -> None:
    made = at(State.JOINING)  # its outbox was lost after the server had the update
    assert kinds(made.step(receipt("accepted"))) == [Remember]
    assert made.state is State.IDLE


def test_a_receipt_of_an_older_round_does_not_end_a_join() -> None:
    made = at(State.JOINING, opening(2))
    assert made.step(receipt("accepted", number=1)) == []
    assert made.state is State.JOINING


@pytest.mark.parametrize("state", [State.FETCHING, State.TRAINING, State.SEALING])
def test_what_the_device_cannot_do_is_said_and_sat_out(state: State) -> None:
    made = at(state)
    effects = made.step(Failed(1, "label 9 is outside 0 … 6"))
    assert kinds(effects) == [Stop, Remember]
    assert made.detail == "label 9 is outside 0 … 6"
    assert kinds(made.step(opening(2))) == [Remember, Send]


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


# ── A device that holds its data out ────────────────────────────────────────────────────


def evaluator(**options) -> Participant:
    return device(role="evaluate", **options)


def evaluating(announced: Announced) -> Participant:
    made = evaluator()
    made.step(announced)
    made.step(Fetched("task", TASK.digest))
    made.step(Fetched("model", MODEL.digest))
    assert made.state is State.EVALUATING
    return made


def test_a_device_that_evaluates_never_trains() -> None:
    made = evaluator()
    assert kinds(made.step(ROUND)) == [Remember, Fetch]
    assert made.step(Fetched("task", TASK.digest)) == [Fetch("model", MODEL)]
    assert made.step(Fetched("model", MODEL.digest)) == [Evaluate(1)]
    assert made.step(Evaluated(1, 30, {"accuracy": 0.5})) == [
        Send(Report(round=1, model_version=1, examples=30, metrics={"accuracy": 0.5})),
        Remember(Memory(round=1, digest=ROUND.digest, evaluated_version=1)),
    ]


def test_each_model_is_measured_once() -> None:
    made = evaluating(closing(1, model_version=2))
    assert made.step(closing(1, model_version=2)) == []
    made.step(Evaluated(2, 30, {}))
    assert Fetch not in kinds(made.step(closing(1, model_version=2)))
    assert kinds(made.step(opening(2, model_version=2))) == [Remember]
    assert made.state is State.IDLE
    assert Fetch in kinds(made.step(closing(2, model_version=3)))


def test_a_report_that_may_be_lost_is_made_again_when_the_server_or_the_broker_came_back() -> None:
    made = evaluating(closing(1, model_version=2))
    said = made.step(Evaluated(2, 30, {}))[0]
    assert made.step(closing(1, model_version=2)) == [said]
    assert said not in made.step(closing(2, model_version=3))


def test_a_newer_model_ends_the_measuring_of_an_older_one() -> None:
    made = evaluating(closing(1, model_version=2))
    effects = made.step(closing(2, model_version=3))
    assert Stop in kinds(effects)
    assert made.step(Evaluated(2, 30, {})) == []
    assert made.state is State.FETCHING


def test_a_rounds_deadline_does_not_stop_a_device_that_evaluates() -> None:
    made = evaluating(ROUND)
    assert made.step(Tick(10_000.0)) == []
    assert made.state is State.EVALUATING


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


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["train", "evaluate"]), st.sampled_from([None, 0]))
def test_any_event_in_any_state_gives_legal_effects_or_a_peer_error(data, role, kept) -> None:
    draws = data.draw(st.randoms(use_true_random=False))
    made = Participant(
        "ward-3",
        memory=Memory(),
        samples=5,
        role=role,
        fleet_epochs=frozenset({1}),
        kept_version=kept,
        draw=draws.random,
    )
    asked_for: dict[bytes, set[int]] = {}
    sealed: list[int] = []
    last: Announced | None = None
    given = UPLOAD
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.integers(0, 2)):
            event = data.draw(st.sampled_from(what_would_help(made, now_s, last, given)))
        else:
            event = data.draw(any_event)
        before = made.memory
        try:
            effects = made.step(event)
        except PeerError:
            assert made.memory == before
            continue
        if isinstance(event, Tick):
            now_s = max(now_s, event.now_s)
        if isinstance(event, Announced) and event.digest == made.memory.digest:
            last = event
        if isinstance(event, Answered) and isinstance(event.message, Need):
            bits = event.message.bitmap[0] if event.message.bitmap else 0
            asked_for.setdefault(event.message.upload, set()).update(
                i for i in range(CHUNKS) if bits >> i & 1
            )

        assert all(isinstance(effect, get_args(Effect)) for effect in effects)
        assert made.memory.round >= before.round, "rounds only grow"
        assert made.memory.round > before.round or made.memory.done >= before.done
        assert made.memory.evaluated_version >= before.evaluated_version
        if made.memory != before:
            assert [e.memory for e in effects if isinstance(e, Remember)][-1] == made.memory
        if made.memory.round > before.round:
            begun = next(i for i, e in enumerate(effects) if isinstance(e, Remember))
            acts = [i for i, e in enumerate(effects) if isinstance(e, Send | Fetch | Train)]
            assert all(i > begun for i in acts), "remembered before it is acted on"
        for effect in effects:
            match effect:
                case SendChunks(upload, indices):
                    assert set(indices) <= asked_for.get(upload, set()), "nobody asked for it"
                case Seal(announcement, _, go):
                    sealed.append(announcement.round)
                    given = go.upload
                case Train() | Seal() | Send(message=Join()):
                    assert role == "train"
    assert len(sealed) == len(set(sealed)), "one update for one round"
