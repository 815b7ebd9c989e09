"""A round, seen from a device that trains, transition by transition."""

import pytest

from broker_bridge.errors import PeerError
from broker_bridge.wire.messages import (
    Busy,
    Init,
    Join,
    Need,
    NeedBlob,
)
from device_client.duties.asking import SILENCE_S, TRIES_MAX
from device_client.events import (
    Answered,
    Discard,
    Failed,
    Fetch,
    Fetched,
    Fetching,
    LinkDown,
    LinkUp,
    Memory,
    Remember,
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
from device_client.participant import State
from tests.device_client.rounds import (
    CHUNKS,
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
