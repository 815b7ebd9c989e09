"""A server whose database was put back from a copy, without the rest."""

import shutil
from contextlib import closing

import pytest

from broker_bridge.errors import LocalError
from server.fleet.home import Home
from tests.fleets import World, write_samples


@pytest.fixture
def world(tmp_path):
    with closing(World(tmp_path)) as made:
        made.agent("ann", data=write_samples(tmp_path / "ann.npz", seed=1))
        made.settle()
        yield made


def run_rounds(world, count):
    assert world.tell(cmd="start", rounds=count)["ok"]
    world.until(lambda: world.coordinator.run is None, "the run ends")
    return world.metrics()


def put_back(world, copy):
    for path in world.home.state.glob("midge.db*"):
        path.unlink()
    shutil.copy(copy, world.home.database)


def start_again_with(world, copy):
    world.kill_server()
    put_back(world, copy)
    world.start_server()
    world.pass_time(1.0)


def test_devices_take_part_after_an_old_copy_of_the_database_was_put_back(world, tmp_path):
    run_rounds(world, 1)
    world.ledger.db.copy_to(tmp_path / "copy.db")
    seen = run_rounds(world, 3)
    start_again_with(world, tmp_path / "copy.db")
    found = run_rounds(world, 1)
    assert (found["state"], found["accepted"]) == ("closed", 1)
    assert found["round"] > seen["round"]
    assert found["model_version"] > seen["model_version"]


def test_a_copy_that_was_made_in_mid_round_does_not_open_that_round_again(world, tmp_path):
    run_rounds(world, 1)
    assert world.tell(cmd="start", rounds=3)["ok"]
    assert world.ledger.has_open_round
    world.ledger.db.copy_to(tmp_path / "copy.db")
    world.until(lambda: world.coordinator.run is None, "the run ends")
    seen = world.metrics()
    start_again_with(world, tmp_path / "copy.db")
    world.until(lambda: world.coordinator.run is None, "the run of the copy ends")
    found = world.metrics()
    assert (found["state"], found["accepted"]) == ("closed", 1)
    assert found["round"] > seen["round"]


def test_the_present_database_is_no_old_copy_wherever_the_server_died(world):
    run_rounds(world, 2)
    newest = world.ledger.model_version
    torn = world.home.state / "models" / f"{newest + 1:06d}.weights"
    torn.write_bytes(b"a model of which the database had not heard")
    world.kill_server()
    world.start_server()
    assert run_rounds(world, 1)["model_version"] == newest + 1


def test_a_server_that_died_behind_the_file_of_the_very_first_model_numbers_it_again(world):
    world.ledger._models.write(1, b"written, and then the power went")
    world.kill_server()
    world.start_server()
    assert run_rounds(world, 1)["round"] == 1


@pytest.mark.parametrize("loss", ["gone", "empty"])
def test_a_fleet_whose_database_is_gone_is_not_taken_for_a_new_one(world, loss):
    run_rounds(world, 1)
    assert Home.find(world.home.folder) == world.home
    world.ledger.close()
    world.home.database.unlink() if loss == "gone" else world.home.database.write_bytes(b"")
    with pytest.raises(LocalError, match=r"midge\.db is gone.*midge restore"):
        Home.find(world.home.folder)
    assert world.home.database.exists() == (loss == "empty")


def test_a_lost_log_of_the_database_is_not_noticed_and_costs_the_round_that_was_open(
    world, tmp_path
):
    """What docs/reliability.md says of it. Whoever mends this turns the test round."""
    closed = run_rounds(world, 1)
    world.ledger.db.checkpoint()  # as the end of the next round would
    assert world.tell(cmd="start", target=2, quorum=1, rounds=9)["ok"]
    opened = world.announcement().round
    world.until(lambda: world.status()["round"]["accepted"] == 1, "a receipt")
    shutil.copy(world.home.database, tmp_path / "without-its-log.db")
    start_again_with(world, tmp_path / "without-its-log.db")
    assert "run" not in world.status()
    assert world.ledger.model_version == closed["model_version"]  # no model is lost
    assert world.tell(cmd="start", rounds=1, deadline_s=30.0)["ok"]
    assert world.announcement().round == opened  # again, and ann has seen it
    world.pass_time(31.0)
    assert world.metrics()["state"] == "abandoned"
    world.until(lambda: world.coordinator.run is None, "the next round closes")
    assert (world.metrics()["state"], world.metrics()["round"]) == ("closed", opened + 1)
