"""A round, seen from the server, transition by transition."""

import hashlib
import math
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.messages import (
    Ack,
    Announcement,
    Blob,
    Busy,
    Command,
    Go,
    Init,
    Join,
    Need,
    Presence,
    Report,
    RoundSummary,
    Settings,
    Until,
)
from server.coordinator import Coordinator, Phase
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
    Rules,
    Run,
    Seen,
    Send,
    ShutOut,
    Started,
    StartRun,
    Tick,
    Upload,
    Withdraw,
)

UPDATE_BYTES = 5000
BODY_BYTES = 1752  # a packet of 2048 bytes, less what stands around the body
COUNT = 3
BLOB = Blob(digest=b"b" * 32, total_bytes=5000, body_bytes=1000)


WEIGHT_MAX = 100


def announcement_of(effect: OpenRound, number: int) -> Opened:
    """What the ledger makes of `OpenRound`."""
    announcement = Announcement(
        federation="demo", round=number, state="open", task=BLOB, task_name="wearables",
        model=BLOB, model_version=number, settings=Settings(epochs=1, learning_rate=0.1),
        delta_bound=10.0, weight_max=WEIGHT_MAX, fraction_bits=32, round_key=b"k" * 32,
        fleet_epoch=1,
        issued_at=0.0, deadline_s=effect.run.deadline_s, target=effect.target,
        quorum=effect.quorum, lottery_seed=b"s" * 32, lottery_threshold=2**32,
    )  # fmt: skip
    return Opened(announcement, digest_of(number), UPDATE_BYTES)


def digest_of(number: int) -> bytes:
    return hashlib.sha256(bytes([number])).digest()


def ids_of(device: str, number: int = 1) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(f"{device}{number}{i}".encode()).digest()[:8] for i in range(3))


def presence(state: str = "ready", role: str = "train") -> Presence:
    return Presence(state=state, boot=1, role=role)


class Server:
    """A coordinator and a ledger that never fails: what it is asked to write, it has written."""

    def __init__(self, *, online: int = 2, evaluators: int = 0, **rules) -> None:
        self.it = Coordinator(federation="demo", rules=Rules(**rules))
        self.number = self.model = 0
        self.server_evaluates = False
        self.effects: list = []
        self.now_s = 0.0
        for i in range(online):
            self.step(Seen(f"d{i}", presence()))
        for i in range(evaluators):
            self.step(Seen(f"e{i}", presence(role="evaluate")))

    def step(self, event) -> list:
        """Take an event and those that follow from it; return every effect."""
        done, todo = [], [event]
        while todo:
            for effect in self.it.step(todo.pop(0)):
                done.append(effect)
                todo += self.perform(effect)
        self.effects += done
        return done

    def perform(self, effect) -> list:
        match effect:
            case StartRun(_, run):
                return [Started(replace(run, id=1))]
            case OpenRound():
                self.number += 1
                return [announcement_of(effect, self.number)]
            case CloseRound():
                self.model += 1
                return [Closed(self.model, self.server_evaluates)]
            case BeginUpload(_, init):
                return [Begun(init.upload, tuple(range(init.layout.count)))]
            case Accept(_, init):
                return [Accepted(init.upload)]
        return []

    def start(self, **command) -> list:
        return self.step(Commanded(Command(cmd="start", task="wearables", **command)))

    def command(self, cmd: str) -> list:
        return self.step(Commanded(Command(cmd=cmd)))

    def pass_time(self, seconds: float) -> list:
        self.now_s += seconds
        return self.step(Tick(self.now_s))

    def join(self, device: str, **changes) -> list:
        join = Join(
            **{
                "round": self.number, "announcement": digest_of(self.number), "samples": 10,
                "packet_bytes_max": 2048, "inflight_max": 20,
            } | changes
        )  # fmt: skip
        return self.step(Joined(device, join, ids_of(device, self.number)))

    def init(self, device: str, attempt: int = 0, **changes) -> Init:
        return Init(
            **{
                "round": self.number, "announcement": digest_of(self.number),
                "upload": ids_of(device, self.number)[attempt], "enc": b"e" * 32,
                "total_bytes": UPDATE_BYTES, "body_bytes": BODY_BYTES, "tags": b"t" * 32,
                "examples": 10, "train_s": 1.0, "metrics": {"loss": 2.0},
            } | changes
        )  # fmt: skip

    def commit(self, device: str, *, ours: bool = True, **changes) -> list:
        return self.step(Inited(device, self.init(device, **changes), ours))

    def upload(self, device: str, attempt: int = 0) -> list:
        """A whole update, from join to receipt."""
        effects = self.join(device) + self.commit(device, attempt=attempt)
        return effects + self.step(Chunk(ids_of(device, self.number)[attempt], 0))


def messages_to(device: str, effects) -> list:
    return [e.message for e in effects if isinstance(e, Send) and e.device == device]


def of(kind: type, effects) -> list:
    return [effect for effect in effects if isinstance(effect, kind)]


def refused(effects) -> str:
    (respond,) = of(Respond, effects)
    assert not respond.reply.ok
    return respond.reply.error


# ── A run from end to end ───────────────────────────────────────────────────────────────


def test_a_run_goes_from_start_to_its_last_round() -> None:
    server = Server()
    assert kinds(server.start(rounds=2)) == [StartRun, OpenRound]
    assert server.it.phase is Phase.OPEN
    assert kinds(server.upload("d0")) == [Send, BeginUpload, Send, Accept, Send]
    effects = server.upload("d1")
    assert kinds(effects)[-4:] == [Send, CloseRound, Publish, OpenRound]
    (summary,) = [e.summary for e in of(Publish, effects)]
    assert (summary.round, summary.state, summary.accepted, summary.model_version) == (
        1, "closed", 2, 1,
    )  # fmt: skip
    assert summary.train_loss == 2.0
    server.upload("d0")
    effects = server.upload("d1")
    assert of(EndRun, effects)[0].status == "done"
    assert server.it.phase is Phase.IDLE


def kinds(effects) -> list[type]:
    return [type(effect) for effect in effects]


def test_what_a_device_hears_in_its_round() -> None:
    server = Server()
    server.start()
    go, need, ack = messages_to("d0", server.upload("d0"))
    assert (go.upload, go.packet_bytes) == (ids_of("d0")[0], 2048)
    assert (need.upload, need.bitmap) == (go.upload, b"\x07")
    assert (ack.status, ack.upload) == ("accepted", go.upload)


def test_a_receipt_comes_only_after_the_disk_has_the_update() -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    effects = server.it.step(Chunk(ids_of("d0")[0], 0))
    assert kinds(effects) == [Accept]
    assert kinds(server.it.step(Accepted(ids_of("d0")[0]))) == [Send]


def test_a_round_waits_for_devices() -> None:
    server = Server(online=0)
    server.start()
    assert server.it.phase is Phase.GATHERING
    assert "waiting for devices: 0" in server.it.detail
    server.step(Seen("d0", presence()))
    assert OpenRound in kinds(server.pass_time(1))


def test_target_0_means_one_update_from_each_device_on_line() -> None:
    server = Server(online=5, evaluators=2)
    server.step(Seen("away", presence("lost")))
    server.step(Seen("asleep", presence("sleeping")))
    (opening,) = of(OpenRound, server.start())
    assert (opening.target, opening.quorum, opening.online) == (5, 3, 5)


def test_the_start_may_say_target_quorum_and_deadline() -> None:
    server = Server(online=5)
    (opening,) = of(OpenRound, server.start(target=4, quorum=2, deadline_s=7.0))
    assert (opening.target, opening.quorum, opening.run.deadline_s) == (4, 2, 7.0)


# ── The operator ────────────────────────────────────────────────────────────────────────


def test_a_start_while_a_run_is_open_is_refused() -> None:
    server = Server()
    server.start()
    assert "run 1" in refused(server.start())


def test_a_quorum_above_the_target_is_refused() -> None:
    assert "quorum 5" in refused(Server().start(target=2, quorum=5))


@pytest.mark.parametrize("cmd", ["stop", "pause", "resume"])
def test_without_a_run_there_is_nothing_to_do(cmd: str) -> None:
    assert "no run is open" in refused(Server().command(cmd))


def test_stop_abandons_the_open_round() -> None:
    server = Server()
    server.start()
    server.upload("d0")
    effects = server.command("stop")
    assert kinds(effects) == [AbandonRound, Publish, EndRun, Respond]
    assert of(EndRun, effects)[0].status == "stopped"
    assert (server.it.phase, server.it.run) == (Phase.IDLE, None)
    assert isinstance(messages_to("d1", server.join("d1"))[0], Busy)


def test_a_paused_run_finishes_its_round_and_opens_no_other() -> None:
    server = Server()
    server.start(rounds=3)
    assert of(MarkPaused, server.command("pause"))[0].paused
    server.upload("d0")
    assert CloseRound in kinds(server.upload("d1"))
    assert server.pass_time(10) == []
    assert server.it.status()["phase"] == "paused"
    server.command("resume")
    assert OpenRound in kinds(server.pass_time(1))


def test_status_says_who_is_there_and_how_far_the_round_is() -> None:
    server = Server(online=3, evaluators=1)
    server.start(rounds=2)
    server.upload("d0")
    server.join("d1")
    found = server.it.status()
    assert found["phase"] == "open"
    assert found["devices"] == {"online": 3, "evaluating": 1, "ready": 4}
    assert found["run"] == {"id": 1, "task": "wearables", "rounds": 2, "rounds_done": 0}
    assert found["round"] == {
        "number": 1, "target": 3, "quorum": 2, "invited": 2, "uploading": 1, "accepted": 1,
        "seconds_left": 600.0,
    }  # fmt: skip


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
    server.step(Chunk(ids_of("d0")[0], 0))
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
    assert kinds(effects) == [Refuse, Send]
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
    server.it.step(Chunk(ids_of("d0")[0], 0))
    effects = server.step(Refused(ids_of("d0")[0], "rejected", "not_finite: it holds NaN"))
    assert kinds(effects) == [Refuse, Send]
    assert messages_to("d0", effects)[0].reason == "it holds NaN"
    assert server.it.rejects == {"not_finite": 1}


@pytest.mark.parametrize("status", ["busy", "resend"])
def test_an_update_that_the_disk_did_not_take_may_come_again(status: str) -> None:
    server = Server()
    server.start()
    server.join("d0")
    server.commit("d0")
    server.it.step(Chunk(ids_of("d0")[0], 0))
    (ack,) = messages_to("d0", server.step(Refused(ids_of("d0")[0], status, "x" * 9000)))
    assert (ack.status, ack.retry_after_s) == (status, 5.0)
    assert len(ack.reason) <= 500, "longer ones do not decode"
    assert kinds(server.commit("d0")) == [BeginUpload, Send]


def test_a_round_at_its_target_closes_when_the_last_one_between_disk_and_sum_is_refused() -> None:
    server = Server(online=3)
    server.start(target=1)
    for device in ("d0", "d1"):
        server.join(device)
        server.commit(device)
        server.it.step(Chunk(ids_of(device)[0], 0))
    assert kinds(server.step(Accepted(ids_of("d0")[0]))) == [Send]
    assert CloseRound in kinds(server.step(Refused(ids_of("d1")[0], "rejected", "x: y")))


def test_an_update_is_counted_once_however_often_its_parts_come() -> None:
    server = Server(online=3)
    server.start()
    server.upload("d0")
    for event in (Chunk(ids_of("d0")[0], 0), Accepted(ids_of("d0")[0]), Begun(ids_of("d0")[0], ())):
        assert server.step(event) == []
    assert server.it.status()["round"]["accepted"] == 1


# ── The end of a round ──────────────────────────────────────────────────────────────────


def test_at_the_deadline_a_quorum_is_enough() -> None:
    server = Server(online=4)
    server.start(target=4, quorum=2, deadline_s=60.0)
    server.upload("d0")
    server.upload("d1")
    assert server.pass_time(59.9) == []
    effects = server.pass_time(0.2)
    assert of(CloseRound, effects)[0].summary.accepted == 2


def test_below_the_quorum_the_round_is_abandoned_and_another_begun() -> None:
    server = Server(online=4)
    server.start(target=4, quorum=2, deadline_s=60.0)
    server.upload("d0")
    effects = server.pass_time(61)
    (summary,) = [e.summary for e in of(AbandonRound, effects)]
    assert (summary.state, summary.accepted) == ("abandoned", 1)
    assert summary.reason == "1 updates at the deadline, 2 were needed"
    assert of(CloseRound, effects) == []
    server.pass_time(1)
    assert (server.it.phase, server.number) == (Phase.OPEN, 2)


def test_a_deadline_waits_for_an_update_between_disk_and_sum() -> None:
    server = Server()
    server.start(deadline_s=60.0)
    server.join("d0")
    server.commit("d0")
    server.it.step(Chunk(ids_of("d0")[0], 0))
    assert server.pass_time(61) == []
    server.step(Accepted(ids_of("d0")[0]))
    assert CloseRound in kinds(server.pass_time(1))


def test_rounds_abandoned_one_after_another_end_the_run_as_failed() -> None:
    server = Server(abandoned_max=3)
    server.start(deadline_s=10.0, rounds=50)
    effects = []
    while server.it.run is not None:
        effects += server.pass_time(5)
    assert len(of(AbandonRound, effects)) == 3
    (end,) = of(EndRun, effects)
    assert end.status == "failed"
    assert "3 rounds in a row were abandoned" in end.reason


def test_a_round_that_succeeds_forgives_those_abandoned_before() -> None:
    server = Server(abandoned_max=2)
    server.start(deadline_s=10.0, rounds=50)
    for _ in range(3):
        server.pass_time(11)
        server.pass_time(1)
        assert server.it.phase is Phase.OPEN, server.it.detail
        server.upload("d0")
        server.upload("d1")
    assert server.it.run is not None


# ── Is it good enough? ──────────────────────────────────────────────────────────────────


def one_round(server: Server) -> list:
    return server.upload("d0") + server.upload("d1")


def test_the_server_measures_and_the_run_ends_at_the_target() -> None:
    server = Server()
    server.server_evaluates = True
    server.start(rounds=9, until=Until(accuracy=0.8))
    assert kinds(one_round(server))[-1] is Evaluate
    assert OpenRound in kinds(server.step(Evaluated(1, 50, {"accuracy": 0.79})))
    one_round(server)
    effects = server.step(Evaluated(2, 50, {"accuracy": 0.8}))
    assert of(Publish, effects)[0].summary.evaluated_by == "server"
    assert "reached the target" in of(EndRun, effects)[0].reason


def test_devices_measure_and_each_example_counts_alike() -> None:
    server = Server(evaluators=2)
    server.start(rounds=9, until=Until(accuracy=0.5))
    one_round(server)
    assert server.it.phase is Phase.EVALUATING
    report = {"round": 1, "model_version": 1}
    first = Report(**report, examples=30, metrics={"accuracy": 0.2, "loss": 1.0})
    assert server.step(Reported("e0", first)) == []
    second = Report(**report, examples=10, metrics={"accuracy": 0.6, "extra": 1.0})
    (published, _) = server.step(Reported("e1", second))
    assert published.summary.evaluation == {"accuracy": pytest.approx(0.3)}
    assert (published.summary.evaluation_examples, published.summary.evaluated_by) == (
        40, "devices",
    )  # fmt: skip


def test_a_report_on_another_model_is_not_counted() -> None:
    server = Server(evaluators=1)
    server.start(rounds=9)
    one_round(server)
    old = Report(round=1, model_version=0, examples=30, metrics={"accuracy": 1.0})
    assert server.step(Reported("e0", old)) == []
    assert server.it.phase is Phase.EVALUATING


def test_a_device_that_trains_does_not_judge_its_own_model() -> None:
    server = Server(evaluators=1)
    server.start(rounds=9, until=Until(accuracy=0.9))
    one_round(server)
    report = Report(round=1, model_version=1, examples=30, metrics={"accuracy": 1.0})
    with pytest.raises(PeerError) as refused:
        server.step(Reported("d0", report))
    assert refused.value.reason == "not_evaluating"
    assert server.it.phase is Phase.EVALUATING


def test_no_report_counts_for_more_examples_than_an_update_may() -> None:
    server = Server(evaluators=2)
    server.start(rounds=9)
    one_round(server)
    most = WEIGHT_MAX
    report = Report(round=1, model_version=1, examples=10**9, metrics={"accuracy": 1.0})
    server.step(Reported("e0", report))
    honest = Report(round=1, model_version=1, examples=most, metrics={"accuracy": 0.0})
    effects = server.step(Reported("e1", honest))
    assert of(Publish, effects)[0].summary.evaluation == {"accuracy": pytest.approx(0.5)}


def test_devices_that_do_not_report_are_waited_for_so_long_and_no_longer() -> None:
    server = Server(evaluators=2, evaluation_wait_s=20.0)
    server.start(rounds=9)
    one_round(server)
    report = Report(round=1, model_version=1, examples=30, metrics={"accuracy": 0.2})
    server.step(Reported("e0", report))
    assert server.pass_time(19) == []
    effects = server.pass_time(2)
    assert of(Publish, effects)[0].summary.evaluation == {"accuracy": pytest.approx(0.2)}
    assert OpenRound in kinds(effects)


def test_a_model_that_nobody_measured_is_not_good_enough() -> None:
    server = Server(evaluators=1, evaluation_wait_s=20.0)
    server.start(rounds=2, until=Until(accuracy=0.1, loss=9.0))
    one_round(server)
    assert OpenRound in kinds(server.pass_time(21))


@pytest.mark.parametrize("until", [Until(accuracy=0.1), Until(loss=9.0)])
def test_what_is_not_a_number_is_not_good_enough(until: Until) -> None:
    server = Server()
    server.server_evaluates = True
    server.start(rounds=9, until=until)
    one_round(server)
    assert OpenRound in kinds(
        server.step(Evaluated(1, 5, {"accuracy": math.nan, "loss": math.nan}))
    )


def test_reports_of_absurd_size_stay_numbers() -> None:
    server = Server(evaluators=2)
    server.start(rounds=9)
    one_round(server)
    effects = []
    for device, loss in (("e0", 1e300), ("e1", -1e300)):
        said = Report(round=1, model_version=1, examples=10**9, metrics={"loss": loss})
        effects += server.step(Reported(device, said))
    assert math.isfinite(of(Publish, effects)[0].summary.evaluation["loss"])


# ── After a crash ───────────────────────────────────────────────────────────────────────

RUN = Run(id=7, task="wearables", rounds=3, target=2, quorum=1, deadline_s=60.0)


def restored(uploads: list[Upload], **options) -> Server:
    server = Server()
    server.number = 1
    opened = announcement_of(OpenRound(RUN, 2, 1, 2), 1)
    server.it.restore(RUN, opened, uploads, now_s=1000.0, **options)
    server.now_s = 1000.0
    return server


def kept(device: str, status: str, attempt: int = 0) -> Upload:
    init = Server().init(device, attempt, round=1, announcement=digest_of(1))
    return Upload(device, ids_of(device)[attempt], 0, init=init, status=status)


def test_an_update_with_a_receipt_counts_after_a_restart() -> None:
    server = restored([kept("d0", "accepted")])
    assert server.it.status()["round"]["accepted"] == 1
    assert messages_to("d0", server.join("d0"))[0].status == "accepted"
    assert CloseRound in kinds(server.upload("d1"))


def test_a_device_let_in_before_the_restart_goes_on_with_its_upload() -> None:
    server = restored([])
    assert kinds(server.commit("d0")) == [BeginUpload, Send]
    assert kinds(server.step(Chunk(ids_of("d0")[0], 0)))[:2] == [Accept, Send]


def test_a_run_that_failed_as_the_server_died_has_failed_when_it_is_back() -> None:
    made = Server().it
    run = replace(RUN, abandoned_in_a_row=made.rules.abandoned_max)
    (ended,) = made.restore(run, None, [], now_s=0.0)
    assert isinstance(ended, EndRun)
    assert (ended.status, made.run) == ("failed", None)


def test_a_deadline_goes_on_over_a_restart() -> None:
    server = restored([kept("d0", "accepted")], elapsed_s=50.0)
    assert server.pass_time(9) == []
    assert CloseRound in kinds(server.pass_time(2))


def test_a_deadline_that_passed_while_the_server_was_away_ends_the_round_at_once() -> None:
    assert CloseRound in kinds(restored([kept("d0", "accepted")], elapsed_s=1e9).pass_time(0.1))


def test_a_paused_run_stays_paused_over_a_restart() -> None:
    server = Server()
    server.it.restore(RUN, None, [], now_s=0.0, paused=True)
    assert server.pass_time(10) == []


def summary_of(version: int, **changes) -> RoundSummary:
    return RoundSummary(
        federation="demo", run=7, round=3, state="closed", task="wearables",
        model_version=version, invited=2, joined=2, accepted=2, **changes,
    )  # fmt: skip


def test_a_run_whose_rounds_are_done_opens_no_other_after_a_restart() -> None:
    server = Server()
    done = replace(RUN, rounds_done=3)
    effects = server.it.restore(done, None, [], now_s=0.0, last=summary_of(3))
    assert effects == []
    assert server.it.phase is Phase.EVALUATING
    effects = server.pass_time(61)
    assert kinds(effects) == [Publish, EndRun]
    assert of(EndRun, effects)[0].status == "done"


def test_a_model_that_was_not_measured_before_the_crash_is_measured_after_it() -> None:
    server = Server()
    effects = server.it.restore(
        replace(RUN, rounds_done=1, until=Until(accuracy=0.5)), None, [], now_s=0.0,
        last=summary_of(1), server_evaluates=True,
    )  # fmt: skip
    assert effects == [Evaluate(1)]
    assert EndRun in kinds(server.step(Evaluated(1, 9, {"accuracy": 0.6})))


def test_a_model_that_was_measured_before_the_crash_decides_after_it() -> None:
    server = Server()
    run = replace(RUN, rounds_done=1, until=Until(accuracy=0.5))
    last = summary_of(1, evaluation={"accuracy": 0.6})
    assert EndRun in kinds(server.it.restore(run, None, [], now_s=0.0, last=last))


# ── Who is shut out ─────────────────────────────────────────────────────────────────────


def test_what_a_revoked_device_gave_is_taken_back_and_counts_no_more() -> None:
    server = Server(online=3)
    server.start(target=3, quorum=1)
    server.upload("d0")
    server.upload("d1")
    (withdrawn,) = server.step(ShutOut("d1", revoked=True))
    assert (withdrawn.device, type(withdrawn)) == ("d1", Withdraw)
    assert server.it.status()["round"]["accepted"] == 1
    (close,) = of(CloseRound, server.pass_time(600.0))
    assert (close.summary.accepted, close.summary.examples) == (1, 10)


def test_a_revoked_device_is_not_here_and_gives_its_place_to_another() -> None:
    server = Server(online=1)
    server.start(target=1)
    answers = [messages_to(f"d{n}", server.join(f"d{n}")) for n in range(9)]
    full = next(n for n, (answer,) in enumerate(answers) if isinstance(answer, Busy))
    assert server.it.knows("d0")
    server.step(ShutOut("d0", revoked=True))
    assert not server.it.knows("d0")
    (answer,) = messages_to(f"d{full}", server.join(f"d{full}"))
    assert isinstance(answer, Go)


def test_an_update_that_is_between_disk_and_sum_is_taken_back_when_it_is_in_it() -> None:
    server = Server(online=2)
    server.start(target=2, quorum=1)
    server.join("d0")
    server.commit("d0")
    upload = ids_of("d0")[0]
    server.it.step(Chunk(upload, 0))  # its Accept is not carried out yet
    assert kinds(server.step(ShutOut("d0", revoked=True))) == [Withdraw]
    assert kinds(server.step(Accepted(upload))) == [Withdraw]
    assert server.it.status()["round"]["accepted"] == 0


def test_a_round_that_is_closing_is_decided_again_without_whoever_was_revoked() -> None:
    server = Server(online=2)
    server.start(target=2, quorum=1)
    server.upload("d0")
    server.join("d1")
    server.commit("d1")
    upload = ids_of("d1")[0]
    server.it.step(Chunk(upload, 0))
    (close,) = of(CloseRound, server.it.step(Accepted(upload)))  # and cannot be written yet
    assert (close.summary.accepted, server.it.phase) == (2, Phase.CLOSING)
    assert kinds(server.step(ShutOut("d1", revoked=True))) == [Withdraw]
    assert server.it.phase is Phase.OPEN
    (close,) = of(CloseRound, server.pass_time(600.0))
    assert close.summary.accepted == 1


def test_the_same_word_twice_moves_a_closing_round_once() -> None:
    server = Server(online=2)
    server.start(target=1, quorum=1)
    server.join("d0")
    server.join("d1")
    server.commit("d0")
    upload = ids_of("d0")[0]
    server.it.step(Chunk(upload, 0))
    server.it.step(Accepted(upload))
    assert server.it.phase is Phase.CLOSING
    server.it.step(ShutOut("d1", revoked=True))  # it gave nothing
    assert server.it.phase is Phase.CLOSING


def test_a_suspended_device_loses_its_place_but_not_what_was_accepted() -> None:
    server = Server(online=3)
    server.start(target=3, quorum=1)
    server.upload("d0")
    server.join("d1")
    assert server.step(ShutOut("d0", revoked=False)) == []
    refuse, answer = server.step(ShutOut("d1", revoked=False))
    assert (type(refuse), answer.message.status) == (Refuse, "rejected")
    assert server.it.status()["round"]["accepted"] == 1


@pytest.mark.parametrize("revoked", [True, False])
def test_without_a_round_a_device_is_only_forgotten(revoked: bool) -> None:
    server = Server(online=2)
    assert server.step(ShutOut("d0", revoked=revoked)) == []
    assert server.it.online() == ["d1"]


# ── Any event in any state ──────────────────────────────────────────────────────────────

devices = st.sampled_from(["d0", "d1", "d2"])
rounds_ = st.integers(0, 3)
attempts = st.integers(0, 2)


def inited(device: str, claimed: str, number: int, attempt: int, ours: bool, **changes) -> Inited:
    made = Server()
    made.number = number
    return Inited(device, made.init(claimed, attempt, **changes), ours)


def joined(device: str, number: int, claimed: int) -> Joined:
    join = Join(round=number, announcement=digest_of(claimed), samples=1, packet_bytes_max=2048,
                inflight_max=1)  # fmt: skip
    return Joined(device, join, ids_of(device, number))


ids = st.builds(lambda d, n, a: ids_of(d, n)[a], devices, rounds_, attempts)
any_event = st.one_of(
    st.floats(0, 3000).map(Tick),
    st.just(LinkDown()),
    st.booleans().map(LinkUp),
    st.builds(
        lambda c, t, q: Commanded(Command(cmd=c, target=t, quorum=q, rounds=2)),
        st.sampled_from(["start", "stop", "pause", "resume", "status"]),
        st.sampled_from([None, 1, 2, 5]),
        st.sampled_from([None, 1, 3]),
    ),
    st.just(Started(RUN)),
    st.builds(
        lambda d, s, r: Seen(d, presence(s, r)), devices,
        st.sampled_from(["init", "ready", "training", "sleeping", "lost"]),
        st.sampled_from(["train", "evaluate"]),
    ),
    st.builds(lambda n: announcement_of(OpenRound(RUN, 2, 1, 2), n), st.integers(1, 3)),
    st.builds(joined, devices, rounds_, rounds_),
    st.builds(
        inited, devices, devices, rounds_, attempts, st.booleans(),
        examples=st.sampled_from([0, 1, 100, 101]),
        body_bytes=st.sampled_from([1, BODY_BYTES, 2**20]),
        metrics=st.sampled_from([{}, {"loss": 1e300}]),
    ),
    st.builds(Begun, ids, st.sampled_from([(), (0, 2)])),
    st.builds(Chunk, ids, st.integers(0, 2)),
    st.builds(Accepted, ids),
    st.builds(Refused, ids, st.sampled_from(["rejected", "busy", "resend"]), st.just("a: b")),
    st.builds(ShutOut, devices, st.booleans()),
    st.builds(Closed, st.integers(0, 4), st.booleans()),
    st.builds(Evaluated, st.integers(0, 4), st.integers(1, 9), st.just({"accuracy": 0.5})),
    st.builds(
        lambda d, v: Reported(d, Report(round=1, model_version=v, examples=5, metrics={})),
        devices, st.integers(0, 4),
    ),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_event_in_any_state_gives_legal_effects_or_a_peer_error(data) -> None:
    server = Server(deadline_s=60.0, abandoned_max=2)
    if data.draw(st.booleans()):
        server.start(rounds=2)
    counted: list[tuple[int, str]] = []
    asked: set[bytes] = set()
    highest = 0
    for _ in range(data.draw(st.integers(1, 30))):
        helpful = data.draw(st.integers(0, 2))
        if helpful and server.it.phase is Phase.OPEN:
            device = data.draw(devices)
            event = data.draw(
                st.sampled_from([
                    joined(device, server.number, server.number),
                    Inited(device, server.init(device), True),
                    Chunk(ids_of(device, server.number)[0], 0),
                ])
            )  # fmt: skip
        else:
            event = data.draw(any_event)
        before = server.it.status()
        try:
            effects = server.step(event)
        except PeerError:
            after = server.it.status()
            assert after.get("round", {}).get("accepted") == before.get("round", {}).get("accepted")
            assert after["phase"] == before["phase"]
            continue
        assert all(isinstance(effect, get_args(Effect)) for effect in effects)
        for effect in effects:
            match effect:
                case BeginUpload(_, init):
                    asked.add(init.upload)
                case Accept(device, init):
                    assert init.upload in asked
                    counted.append((init.round, device))
                case Send(message=Need() as need):
                    assert need.upload in asked
        this = server.it.announcement
        if this is not None:
            assert this.round >= highest, "rounds only grow"
            highest = this.round
    assert len(counted) == len(set(counted)), "an update is counted once"
