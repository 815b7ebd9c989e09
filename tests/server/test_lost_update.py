"""A disk that lost an update with a receipt: what a server says then, and how one goes on."""

from contextlib import closing

import pytest

from broker_bridge.disk import alone
from broker_bridge.errors import LocalError
from server.cli import main as midge
from tests.fleets import World, is_refusal, typed


@pytest.fixture
def world(tmp_path):
    with closing(World(tmp_path)) as made:
        made.a, made.b = made.hand("a"), made.hand("b")
        assert made.tell(cmd="start", target=2, rounds=9)["ok"]
        assert made.a.upload(made.a.delta()).status == "accepted"
        yield made


def lose_the_spool(world):
    for path in (world.home.state / "spool").iterdir():
        path.write_bytes(bytes(path.stat().st_size))


def stopped_without_server(world):
    return typed(midge, "stop", "--without-server", "--dir", str(world.home.folder))


def test_an_update_that_the_disk_lost_is_given_up_when_the_operator_says_so(world):
    world.kill_server()
    lose_the_spool(world)
    with pytest.raises(LocalError, match=r"has a receipt and cannot be read.*--without-server"):
        world.start_server()
    world.kill_server()
    assert stopped_without_server(world).returncode == 0
    world.start_server()
    assert "run" not in world.status()
    a, b = (world.hand(hand.name, identity=hand.identity) for hand in (world.a, world.b))
    assert world.tell(cmd="start", target=2, rounds=1)["ok"]
    for hand in (a, b):
        assert hand.upload(hand.delta()).status == "accepted"
    assert world.metrics()["state"] == "closed"


def test_there_has_to_be_something_to_stop_and_no_server_at_work(world):
    with alone(world.home.state / "server.lock"):
        is_refusal(stopped_without_server(world), "a server is running")
    assert stopped_without_server(world).returncode == 0
    is_refusal(stopped_without_server(world), "no run is open")
