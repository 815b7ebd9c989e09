"""A broker that forgets: the server lays out again what should lie there, and nothing is lost."""

import json

import pytest

from server.coordinator import Phase
from tests.fleets import TOPICS


@pytest.fixture
def arena(worlds):
    world = worlds()
    world.a, world.b = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", target=2, rounds=2)["ok"]
    return world


def servers(world):
    """What the server retains, by topic."""
    devices = TOPICS.state("a").rsplit("/", 2)[0]
    return {t: m.payload for t, m in world.broker.retained.items() if not t.startswith(devices)}


def test_a_broker_that_was_wiped_gets_everything_back(arena):
    before = servers(arena)
    assert TOPICS.round in before
    arena.broker.restart(keep=False)
    arena.pass_time(5)
    assert servers(arena) == before


def test_a_broker_that_was_wiped_after_a_round_gets_the_closed_round_and_its_metrics(arena):
    for device in (arena.a, arena.b):
        device.upload(device.delta())
    for device in (arena.a, arena.b):
        device.upload(device.delta())
    assert arena.status()["phase"] == "idle"
    before = servers(arena)
    arena.broker.restart(keep=False)
    arena.pass_time(5)
    assert servers(arena) == before
    assert json.loads(before[TOPICS.metrics])["round"] == 2
    assert arena.announcement().state == "closed"


def test_a_server_that_restarts_over_a_wiped_broker_lays_out_its_open_round(arena):
    arena.a.upload(arena.a.delta())
    before = servers(arena)
    arena.kill_server()
    arena.broker.restart(keep=False)
    arena.start_server()
    assert servers(arena) == before
    assert arena.coordinator.status()["round"]["accepted"] == 1


def test_a_server_that_restarts_with_no_run_open_lays_out_what_was_said_last(arena):
    for _ in range(2):
        for device in (arena.a, arena.b):
            device.upload(device.delta())
    assert arena.status()["phase"] == "idle"
    before = servers(arena)
    arena.kill_server()
    arena.broker.restart(keep=False)
    arena.start_server()
    assert servers(arena) == before
    assert arena.announcement().model_version == 3


def test_a_server_that_restarts_after_an_abandoned_round_says_so_again(arena):
    arena.tell(cmd="pause")
    arena.pass_time(601)
    before = servers(arena)
    arena.kill_server()
    arena.broker.restart(keep=False)
    arena.start_server()
    assert servers(arena) == before
    assert arena.metrics()["state"] == "abandoned"


def test_a_server_whose_last_task_is_gone_starts_without_it(arena, caplog):
    arena.tell(cmd="stop")
    (arena.home.folder / "tasks" / "wearables.task").unlink()
    arena.kill_server()
    arena.broker.restart(keep=False)
    arena.start_server()
    assert not servers(arena).keys() & {TOPICS.round, TOPICS.metrics, TOPICS.task(0)}
    assert "the last run's model is not laid out: there is no task 'wearables' here" in caplog.text


def test_a_broker_that_came_back_from_an_old_copy_gets_the_present_announcement(arena):
    """It says that the session goes on, and holds what was retained minutes ago."""
    old = arena.broker.retained[TOPICS.round]
    for device in (arena.a, arena.b):
        device.upload(device.delta())
    new = arena.broker.retained[TOPICS.round]
    assert new != old
    arena.broker.restart(keep=True)
    arena.broker.retained[TOPICS.round] = old
    arena.pass_time(5)
    assert arena.broker.retained[TOPICS.round].payload == new.payload


def test_a_server_says_that_it_is_there_after_its_last_will_said_otherwise(arena):
    arena.link.drop(away_s=60)
    assert TOPICS.srv not in arena.broker.retained, "the will of this server is to be forgotten"
    arena.pass_time(61)
    assert json.loads(arena.broker.retained[TOPICS.srv].payload)["state"] == "online"


def test_a_restarted_server_waits_for_no_evaluation_that_nobody_can_make(arena):
    arena.hand("eve", role="evaluate")
    for device in (arena.a, arena.b):
        device.upload(device.delta())
    assert arena.coordinator.phase is Phase.EVALUATING
    arena.kill_server()
    arena.broker.restart(keep=False)
    arena.start_server()
    arena.pass_time(4)
    assert arena.coordinator.phase is Phase.EVALUATING
    arena.pass_time(2)
    assert arena.coordinator.phase is Phase.GATHERING


def test_no_receipt_is_revoked_when_the_broker_forgets(arena):
    arena.a.upload(arena.a.delta())
    arena.broker.restart(keep=False)
    arena.pass_time(5)
    arena.b.listen()
    assert arena.b.upload(arena.b.delta()).status == "accepted"
    assert arena.metrics()["accepted"] == 2


def test_no_round_is_opened_while_there_is_no_broker(arena):
    arena.link.drop(away_s=10_000)
    arena.pass_time(700)
    arena.pass_time(700)
    assert arena.coordinator.run is not None, "the run waits"
    assert arena.coordinator.run.abandoned_in_a_row == 1
    assert arena.coordinator.detail == "waiting for the broker"


def test_who_is_there_is_asked_anew_when_the_broker_forgot(arena):
    arena.broker.restart(keep=False)
    arena.pass_time(5)
    assert arena.coordinator.online() == []
    arena.a.listen()
    arena.a.show("ready")
    arena.settle()
    assert arena.coordinator.online() == ["a"]
