"""Devices that say too much or too fast: dropped, counted, and no trouble for the others."""

import pytest

from server.quotas import Shares
from tests.fleets import TOPICS

SHARE = 30  # messages a minute


@pytest.fixture
def arena(worlds):
    world = worlds(shares=Shares(control_per_minute=SHARE, repeats_max=2))
    world.a, world.b, world.evil = (world.hand(n) for n in ("a", "b", "evil"))
    assert world.tell(cmd="start", target=2)["ok"]
    return world


def completes(world):
    for device in (world.a, world.b):
        assert device.upload(device.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2


@pytest.mark.parametrize("kind", ["join", "init", "need", "report", "enrol"])
def test_a_device_that_floods_is_dropped_and_the_others_go_on(arena, kind):
    before = arena.rejected()
    for _ in range(10 * SHARE):
        arena.evil.say(kind, b"garbage")
    assert arena.rejected()["too_fast"] >= 9 * SHARE - 10
    assert sum(arena.rejected().values()) - sum(before.values()) == 10 * SHARE
    completes(arena)


def test_a_device_that_joins_all_the_time_is_answered_no_more_than_its_share(arena):
    answers = sum(len(arena.evil.join()) for _ in range(10 * SHARE))
    assert 0 < answers <= SHARE
    completes(arena)


def test_a_device_that_was_too_fast_is_heard_again_after_a_while(arena):
    for _ in range(2 * SHARE):
        arena.evil.join()
    assert arena.evil.join() == []
    arena.pass_time(10)
    assert len(arena.evil.join()) == 1


def test_presence_that_flaps_is_heard_no_more_often_than_its_share(arena):
    for number in range(10 * SHARE):
        arena.evil.show("ready" if number % 2 else "lost")
    arena.settle()
    assert arena.rejected()["too_fast"] >= 9 * SHARE - 10
    completes(arena)


def test_chunks_sent_many_times_over_are_dropped(arena):
    init, sealed = arena.a.seal(arena.a.go(), arena.a.delta())
    arena.a.commit(init)
    for _ in range(4):
        arena.a.send(sealed, range(1, sealed.layout.count))
    assert arena.rejected()["too_much"] > 0
    assert arena.status()["round"]["accepted"] == 0


def test_chunks_that_nobody_asked_for_are_dropped_and_the_others_go_on(arena):
    for _ in range(500):
        arena.evil.link.publish(TOPICS.up(0, "evil", "data"), bytes(4096))
    arena.settle()
    assert sum(arena.rejected().values()) == 500
    completes(arena)


def test_an_idle_upload_is_let_go_at_the_deadline(worlds):
    world = worlds(rounds={"deadline_s": 60.0, "quorum": 1})
    a, b = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", target=2)["ok"]
    a.upload(a.delta())
    init, sealed = b.seal(b.go(), b.delta())
    b.commit(init)
    b.send(sealed, [0])
    assert any((world.home.state / "spool").iterdir())
    world.pass_time(61)
    assert world.metrics()["accepted"] == 1
    assert not any((world.home.state / "spool").iterdir())


def test_nonsense_for_hours_fills_no_log(arena, caplog):
    with caplog.at_level("INFO", logger="midge.server"):
        for _ in range(1000):
            arena.evil.link.publish(TOPICS.up(0, "evil", "join"), b"garbage")
        arena.settle()
    assert len([r for r in caplog.records if r.levelname == "INFO"]) < 30
