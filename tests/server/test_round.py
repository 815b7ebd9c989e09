"""An open round: who has a place in it, and what becomes of each place."""

import msgspec
import pytest

from broker_bridge.errors import PeerError
from broker_bridge.limits import LIMITS
from broker_bridge.link.queued_link import packet_bytes
from broker_bridge.wire.envelope import SignKey
from broker_bridge.wire.messages import Ack, Busy, Go, signed_together
from broker_bridge.wire.topics import Topics
from server.events import (
    Accepted,
    Acknowledge,
    BeginUpload,
    Begun,
    CloseRound,
    Complete,
    Forget,
    Inited,
    Refuse,
    Refused,
    Seen,
    Send,
)
from tests.server.rounds import (
    BODY_BYTES,
    UPDATE_BYTES,
    Server,
    ids_of,
    kinds,
    messages_to,
    of,
    presence,
)

# ── Who is let in ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [{"round": 9}, {"announcement": b"x" * 32}])
def test_a_join_for_another_round_is_sent_away(changes) -> None:
    server = Server()
    server.start()
    (busy,) = messages_to("d0", server.join("d0", **changes))
    assert isinstance(busy, Busy)
    assert busy.retry_after_s < 0


def test_a_join_while_no_round_is_open_is_sent_away() -> None:
    (busy,) = messages_to("d0", Server().join("d0"))
    assert isinstance(busy, Busy)


def test_more_are_let_in_than_are_needed_and_then_the_cohort_is_full() -> None:
    server = Server(online=20)
    server.start(target=10)
    for i in range(13):
        assert isinstance(messages_to(f"d{i}", server.join(f"d{i}"))[0], Go)
    (busy,) = messages_to("d13", server.join("d13"))
    assert busy.reason == "the cohort is full"
    assert busy.retry_after_s > 0


def test_no_more_uploads_are_open_at_once_than_may_be_and_the_others_come_later() -> None:
    server = Server(online=20, uploads_max=3)
    server.start(target=10)
    for i in range(3):
        assert isinstance(messages_to(f"d{i}", server.join(f"d{i}"))[0], Go)
    (busy,) = messages_to("d3", server.join("d3"))
    assert isinstance(busy, Busy)
    assert "as many uploads are open" in busy.reason
    for i in range(10):  # as one is done, another may come: the target is reached all the same
        assert messages_to(f"d{i}", server.upload(f"d{i}"))[-1].status == "accepted"
    assert server.model == 1


def test_a_lost_devices_place_is_given_away() -> None:
    server = Server(online=20)
    server.start(target=10)
    for i in range(13):
        server.join(f"d{i}")
    server.step(Seen("d4", presence("lost")))
    assert isinstance(messages_to("d13", server.join("d13"))[0], Go)
    assert isinstance(messages_to("d14", server.join("d14"))[0], Busy)


def test_the_place_of_a_lost_device_whose_update_is_here_stays_its_own() -> None:
    server = Server(online=20)
    server.start(target=10)
    for i in range(13):
        server.join(f"d{i}")
    server.upload("d4")
    server.step(Seen("d4", presence("lost")))
    assert isinstance(messages_to("d13", server.join("d13"))[0], Busy)


def test_a_join_that_comes_twice_gets_the_same_place() -> None:
    server = Server()
    server.start()
    first, second = server.join("d0"), server.join("d0")
    assert messages_to("d0", first) == messages_to("d0", second)


def test_a_device_that_joins_again_after_its_commit_gets_a_new_attempt() -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    effects = server.join("d0")
    assert of(Forget, effects) == [Forget(ids_of("d0")[0])]
    assert messages_to("d0", effects)[0].upload == ids_of("d0")[1]
    with pytest.raises(PeerError):
        server.commit("d0", attempt=0)
    assert isinstance(messages_to("d0", server.upload("d0", attempt=1)[-2:])[-1], Ack)


def test_attempts_are_limited() -> None:
    server = Server()
    server.start()
    for attempt in range(3):
        server.join("d0")
        server.commit("d0", attempt=attempt)
    (busy,) = messages_to("d0", server.join("d0"))
    assert busy.reason == "too many attempts"
    assert busy.retry_after_s < 0


def test_a_join_after_the_receipt_gets_the_receipt_again() -> None:
    server = Server()
    server.start()
    (ack,) = messages_to("d0", server.upload("d0"))[-1:]
    assert messages_to("d0", server.join("d0")) == [ack]


@pytest.mark.parametrize(("offered", "given_"), [(0, 61440), (300, 1024), (10**9, 61440)])
def test_packets_are_as_large_as_both_sides_can(offered: int, given_: int) -> None:
    server = Server()
    server.start()
    (go,) = messages_to("d0", server.join("d0", packet_bytes_max=offered))
    assert go.packet_bytes == given_


# ── Uploads ─────────────────────────────────────────────────────────────────────────────


def test_a_commit_that_comes_again_gets_the_present_answer() -> None:
    server = Server()
    server.start()
    server.join("d0")
    assert kinds(server.commit("d0")) == [BeginUpload, Send]
    assert kinds(server.commit("d0")) == [BeginUpload, Send]
    server.step(Complete(ids_of("d0")[0]))
    (ack,) = messages_to("d0", server.commit("d0"))
    assert ack.status == "accepted"


def test_an_upload_that_nobody_asked_for_is_refused() -> None:
    server = Server()
    server.start()
    with pytest.raises(PeerError) as caught:
        server.commit("d0", ours=False)
    assert caught.value.reason == "unasked_upload"


def test_a_commit_to_another_devices_upload_is_refused() -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.join("d1")
    with pytest.raises(PeerError) as caught:
        server.step(Inited("d1", server.init("d0"), ours=False))
    assert caught.value.reason == "unasked_upload"


def test_a_changed_commit_is_refused() -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    with pytest.raises(PeerError) as caught:
        server.commit("d0", tags=b"u" * 32)
    assert caught.value.reason == "changed_commit"
    assert server.it.upload(ids_of("d0")[0]).init == server.init("d0")


def test_a_commit_to_a_round_that_is_over_is_late() -> None:
    server = Server()
    server.start()
    (ack,) = messages_to("d0", server.commit("d0", round=9))
    assert ack.status == "late"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"examples": 0}, "no_examples"),
        ({"examples": 101}, "absurd_examples"),
        ({"examples": 2**53}, "absurd_examples"),
        ({"total_bytes": UPDATE_BYTES - 1}, "wrong_size"),
        ({"total_bytes": 2**30}, "wrong_size"),
        ({"body_bytes": BODY_BYTES - 1}, "wrong_size"),
        ({"body_bytes": 5000}, "wrong_size"),
    ],
)
def test_a_commit_that_promises_nonsense_is_rejected(changes, reason: str) -> None:
    server = Server()
    server.start()
    server.join("d0")
    effects = server.commit("d0", **changes)
    assert kinds(effects) == [Refuse, Acknowledge]
    assert messages_to("d0", effects)[0].status == "rejected"
    assert server.it.rejects == {reason: 1}
    assert server.it.status()["round"]["accepted"] == 0


def test_an_update_that_was_rejected_stays_rejected() -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0", examples=0)
    for effects in (server.commit("d0"), server.join("d0")):
        assert messages_to("d0", effects)[0].status == "rejected"


def test_an_update_without_sense_is_rejected_when_it_is_opened() -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    server.it.step(Complete(ids_of("d0")[0]))
    effects = server.step(Refused(ids_of("d0")[0], "rejected", "not_finite: it holds NaN"))
    assert kinds(effects) == [Refuse, Acknowledge]
    assert messages_to("d0", effects)[0].reason == "it holds NaN"
    assert server.it.rejects == {"not_finite": 1}


@pytest.mark.parametrize("status", ["busy", "resend"])
def test_an_update_that_the_disk_did_not_take_may_come_again(status: str) -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    server.it.step(Complete(ids_of("d0")[0]))
    (ack,) = messages_to("d0", server.step(Refused(ids_of("d0")[0], status, "x" * 9000)))
    assert (ack.status, ack.retry_after_s) == (status, 5.0)
    assert len(ack.reason) <= 500, "longer ones do not decode"
    assert kinds(server.commit("d0")) == [BeginUpload, Send]


@pytest.mark.parametrize("status", ["busy", "rejected"])
@pytest.mark.parametrize("letter", ["x", "é", "層", "\udcff"])
def test_every_receipt_fits_into_a_packet_of_the_smallest_broker(status: str, letter: str) -> None:
    """Its reason may name a tensor or a folder, in any script. The link refused a longer one."""
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    server.it.step(Complete(ids_of("d0")[0]))
    refused = Refused(ids_of("d0")[0], status, "not_finite: " + letter * 9000)
    (ack,) = messages_to("d0", server.step(refused))
    longest = msgspec.structs.replace(ack, round=2**53, retry_after_s=1e9 / 3)
    name, key = "n" * LIMITS.name_chars_max, SignKey.from_seed(bytes(32))
    for signed in signed_together(key, "ack", [(f"{name}/{name}", longest)] * 64):
        topic = Topics(name).down(name, "ack")
        assert packet_bytes(topic, signed, protocol="5.0") <= LIMITS.packet_bytes_min


def test_a_round_at_its_target_closes_when_the_last_one_between_disk_and_sum_is_refused() -> None:
    server = Server(online=3)
    server.start(target=1)
    for device in ("d0", "d1"):
        server.join(device)
        server.commit(device)
        server.it.step(Complete(ids_of(device)[0]))
    assert kinds(server.step(Accepted((ids_of("d0")[0],)))) == [Acknowledge]
    assert CloseRound in kinds(server.step(Refused(ids_of("d1")[0], "rejected", "x: y")))


def test_an_update_is_counted_once_however_often_its_parts_come() -> None:
    server = Server(online=3)
    server.start()
    server.upload("d0")
    upload = ids_of("d0")[0]
    for event in (Complete(upload), Accepted((upload,)), Begun(upload, ())):
        assert server.step(event) == []
    assert server.it.status()["round"]["accepted"] == 1
