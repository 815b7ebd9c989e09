"""A server whose database was put back from a copy, without the rest."""

import os
import shutil
from contextlib import closing

import pytest

from broker_bridge.errors import LocalError
from server.fleet.home import Home
from server.store.highest import HighestRound
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


def test_a_copy_that_is_one_round_older_is_noticed(world, tmp_path):
    run_rounds(world, 1)
    world.ledger.db.copy_to(tmp_path / "copy.db")
    seen = run_rounds(world, 1)
    start_again_with(world, tmp_path / "copy.db")
    found = run_rounds(world, 1)
    assert (found["state"], found["accepted"]) == ("closed", 1)
    assert found["round"] > seen["round"]


# ── The log beside the database is lost ─────────────────────────────────────────────────


def open_with_a_receipt(world):
    """A round with one update, all of it in the log alone; return its number."""
    world.ledger.db.checkpoint()  # as the end of the last round does, once nobody reads
    assert world.tell(cmd="start", target=2, quorum=1, rounds=9)["ok"]
    world.until(lambda: world.status()["round"]["accepted"] == 1, "a receipt")
    return world.announcement().round


def test_a_lost_log_of_the_database_is_noticed_and_rounds_go_on_above_it(world, tmp_path, caplog):
    closed = run_rounds(world, 1)
    opened = open_with_a_receipt(world)
    world.enrol("bob")
    shutil.copy(world.home.database, tmp_path / "without-its-log.db")
    start_again_with(world, tmp_path / "without-its-log.db")
    said = [m for m in caplog.messages if "its log is lost" in m]
    assert len(said) == 1
    assert f"it knows of no round above {closed['round']}, and round {opened} was opened" in said[0]
    assert world.ledger.model_version == closed["model_version"]  # no model is lost
    assert "run" not in world.status()  # what is lost: the run, its round, who enrolled since
    with world.ledger.db.reading() as tx:
        assert (tx.device("ann") is None, tx.device("bob") is None) == (False, True)
    found = run_rounds(world, 1)
    assert (found["state"], found["accepted"]) == ("closed", 1)
    assert found["round"] > opened
    world.kill_server()
    world.start_server()
    assert [m for m in caplog.messages if "its log is lost" in m] == said  # it is settled


def test_a_log_that_is_lost_in_the_middle_of_a_run_costs_the_open_round_alone(world, tmp_path):
    assert world.tell(cmd="start", target=1, rounds=2)["ok"]
    world.until(lambda: world.announcement().round == 2, "the second round opens")
    shutil.copy(world.home.database, tmp_path / "without-its-log.db")
    start_again_with(world, tmp_path / "without-its-log.db")
    world.pass_time(5.0)
    world.until(lambda: world.coordinator.run is None, "the run ends")
    found = world.metrics()
    assert (found["state"], found["accepted"]) == ("closed", 1)
    assert found["round"] > 2
    with world.ledger.db.reading() as tx:
        assert [r.status for r in tx.rounds_of(1)] == ["closed", "closed"]


def test_a_log_that_is_cut_short_anywhere_opens_no_round_twice(world, tmp_path):
    run_rounds(world, 1)
    opened, before = open_with_a_receipt(world), world.announcement()
    shutil.copytree(world.home.state, tmp_path / "state")
    log = (tmp_path / "state" / "midge.db-wal").read_bytes()
    frames = range(32, len(log) + 1, 24 + 4096)  # SQLite's log: a header, then page by page
    found = []
    for length in frames:
        world.kill_server()
        shutil.rmtree(world.home.state)
        shutil.copytree(tmp_path / "state", world.home.state)
        os.truncate(f"{world.home.database}-wal", length)
        world.start_server()
        goes_on = world.ledger.has_open_round and world.announcement() == before
        with world.ledger.db.reading() as tx:
            assert goes_on or tx.highest_round() > opened
        found.append(world.status()["round"]["accepted"] if goes_on else "above it")
    assert (found[0], found[-1]) == ("above it", 1)
    assert 0 in found  # the round is in what is left of the log, and its receipt is not


# ── The file of the highest round itself ────────────────────────────────────────────────


@pytest.mark.parametrize("content", [None, b"", b"\0" * 20, b"9 nonsense"])
def test_a_fleet_whose_file_of_the_highest_round_is_lost_or_damaged_goes_on_and_has_it_again(
    world, content
):
    run_rounds(world, 1)
    opened = open_with_a_receipt(world)
    world.kill_server()
    path = world.home.state / "highest-round"
    path.unlink() if content is None else path.write_bytes(content)
    world.start_server()
    assert world.status()["round"] == world.status()["round"] | {"number": opened, "accepted": 1}
    assert HighestRound(path).known == opened


def test_no_file_of_the_highest_round_is_needed_to_begin_and_the_first_round_makes_it(world):
    path = world.home.state / "highest-round"
    assert not path.exists()
    assert run_rounds(world, 3)["round"] == HighestRound(path).known == 3
