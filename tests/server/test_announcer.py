"""What is announced of a round: how long its joins are spread."""

from contextlib import closing

import pytest

from server.events import OpenRound
from tests.fleets import World


@pytest.fixture
def jitter_of(tmp_path):
    """`jitter_of(online, target)`: seconds over which the devices that are drawn join."""
    with closing(World(tmp_path)) as world:
        world.hand("a")
        assert world.tell(cmd="start", rounds=1)["ok"]
        run = world.coordinator.run

        def jitter_of(online, target):
            effect = OpenRound(run, target, 1, online)
            return world.ledger.announcer.opening(effect, 99, bytes(32)).jitter_s

        yield jitter_of


def test_joins_are_spread_the_longer_the_more_devices_come(jitter_of):
    assert jitter_of(10, 10) == 0.0
    assert 0.0 < jitter_of(1_000, 1_000) < jitter_of(10_000, 10_000)
    # 200 joins a second, for updates so small that their bytes take less time than that.
    assert jitter_of(10_000, 10_000) == 50.0


def test_who_is_not_drawn_makes_nobody_wait(jitter_of):
    assert jitter_of(100_000, 100) == jitter_of(1_000, 100) < jitter_of(1_000, 1_000)
