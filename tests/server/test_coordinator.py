"""A run, seen from the server, transition by transition."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_bridge.errors import PeerError
from broker_bridge.wire.messages import (
    Busy,
    Command,
    Go,
    Join,
    Need,
    Report,
    RoundSummary,
    Until,
)
from server.coordinator import Phase
from server.events import (
    AbandonRound,
    Accept,
    Accepted,
    Acknowledge,
    BeginUpload,
    Begun,
    Closed,
    CloseRound,
    Commanded,
    Complete,
    Effect,
    EndRun,
    Evaluate,
    Evaluated,
    Inited,
    Joined,
    LinkDown,
    LinkUp,
    MarkPaused,
    OpenRound,
    Publish,
    Refuse,
    Refused,
    Reported,
    Respond,
    Room,
    Run,
    Seen,
    Send,
    ShutOut,
    Started,
    StartRun,
    Tick,
    Unread,
    Upload,
    Withdraw,
)
from tests.server.rounds import (
    BODY_BYTES,
    Server,
    announcement_of,
    digest_of,
    ids_of,
    kinds,
    messages_to,
    of,
    presence,
    refused,
)

# ── A run from end to end ───────────────────────────────────────────────────────────────


def test_a_run_goes_from_start_to_its_last_round() -> None:
    server = Server()
    assert kinds(server.start(rounds=2)) == [StartRun, OpenRound]
    assert server.it.phase is Phase.OPEN
    assert kinds(server.upload("d0")) == [Send, BeginUpload, Send, Accept, Acknowledge]
    effects = server.upload("d1")
    assert kinds(effects)[-4:] == [Acknowledge, CloseRound, Publish, OpenRound]
    (summary,) = [e.summary for e in of(Publish, effects)]
    assert (summary.round, summary.state, summary.accepted, summary.model_version) == (
        1, "closed", 2, 1,
    )  # fmt: skip
    assert summary.train_loss == 2.0
    server.upload("d0")
    effects = server.upload("d1")
    assert of(EndRun, effects)[0].status == "done"
    assert server.it.phase is Phase.IDLE


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
    effects = server.it.step(Complete(ids_of("d0")[0]))
    assert kinds(effects) == [Accept]
    assert kinds(server.it.step(Accepted((ids_of("d0")[0],)))) == [Acknowledge]


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


# ── What is wrong here ──────────────────────────────────────────────────────────────────


def test_rounds_go_on_while_a_file_of_the_fleet_cannot_be_read_and_the_status_says_so() -> None:
    server = Server(online=2)
    server.step(Unread("roster.json is damaged"))
    assert OpenRound in kinds(server.start(rounds=2))
    server.upload("d0")
    assert OpenRound in kinds(server.upload("d1"))
    assert server.it.status()["detail"] == "roster.json is damaged"
    server.step(Unread())
    assert server.it.status()["detail"] == "round 2 is open"


def test_each_trouble_is_in_the_status_until_it_is_over() -> None:
    server = Server(online=1)
    idle = server.it.status()["detail"]
    server.step(Unread("roster.json is damaged"))
    server.step(Room("the disk is full"))
    assert server.it.status()["detail"] == "the disk is full; roster.json is damaged"
    server.step(Room())
    assert server.it.status()["detail"] == "roster.json is damaged"
    server.step(Unread())
    assert server.it.status()["detail"] == idle


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
    server.it.step(Complete(ids_of("d0")[0]))
    assert server.pass_time(61) == []
    server.step(Accepted((ids_of("d0")[0],)))
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
    assert kinds(server.step(Complete(ids_of("d0")[0])))[:2] == [Accept, Acknowledge]


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
    server.it.step(Complete(upload))  # its Accept is not carried out yet
    assert kinds(server.step(ShutOut("d0", revoked=True))) == [Withdraw]
    assert kinds(server.step(Accepted((upload,)))) == [Withdraw]
    assert server.it.status()["round"]["accepted"] == 0


def test_a_round_that_is_closing_is_decided_again_without_whoever_was_revoked() -> None:
    server = Server(online=2)
    server.start(target=2, quorum=1)
    server.upload("d0")
    server.join("d1")
    server.commit("d1")
    upload = ids_of("d1")[0]
    server.it.step(Complete(upload))
    (close,) = of(CloseRound, server.it.step(Accepted((upload,))))  # and cannot be written yet
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
    server.it.step(Complete(upload))
    server.it.step(Accepted((upload,)))
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
    assert (type(refuse), answer.ack.status) == (Refuse, "rejected")
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
    st.sampled_from(["", "the disk is full"]).map(Room),
    st.sampled_from(["", "roster.json is damaged"]).map(Unread),
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
    st.builds(Complete, ids),
    st.builds(Accepted, st.lists(ids, max_size=3).map(tuple)),
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
                    Complete(ids_of(device, server.number)[0]),
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
