"""What a command changes beside a running server: seen within a second, and what cannot be read of
it is in the status until it is mended."""

import json
import os

import pytest

from tests.fleets import TOPICS, wait_until

FILES = {"members": "roster.json", "keys": "server.json"}


def file_of(home, what):
    """A good one, as a fleet has that has revoked somebody."""
    home.set_roster(home.roster())
    return home.folder / "keys" / FILES[what]


def changed(world):
    """What a command leaves behind that changed who belongs to the fleet."""
    with world.ledger.db.transaction() as tx:
        tx.count_fleet_change()


def looks(world, times=5):
    for _ in range(times):
        world.pass_time(1.1)


def said(caplog, words):
    """The lines of the log, from the beginning of the test, in which these words are."""
    lines = [r.getMessage() for when in ("setup", "call") for r in caplog.get_records(when)]
    return [line for line in lines if words in line]


@pytest.fixture(params=FILES)
def damaged(request, world, caplog):
    """A server at work, in a round for one device, one of whose files was damaged meanwhile."""
    caplog.set_level("INFO")
    world.ann = world.hand("ann")
    world.what, world.file = request.param, file_of(world.home, request.param)
    assert world.tell(cmd="start", target=1, rounds=2)["ok"]
    world.good = world.file.read_bytes()
    world.file.write_bytes(b"neither keys nor a roster")
    if world.what == "members":
        changed(world)
    looks(world)
    return world


def test_a_file_that_cannot_be_read_is_named_in_the_status(damaged):
    status = damaged.status()
    assert str(damaged.file) in status["detail"]
    assert f"going on with the {damaged.what} of before" in status["detail"]
    assert status["phase"] == "open"


def test_rounds_go_on_meanwhile(damaged):
    assert damaged.ann.upload(damaged.ann.delta()).status == "accepted"
    assert (damaged.metrics()["state"], damaged.announcement().round) == ("closed", 2)
    assert str(damaged.file) in damaged.status()["detail"]


def test_it_is_logged_once_and_not_every_second(damaged, caplog):
    looks(damaged, 20)
    assert len(said(caplog, "of before")) == 1


def test_another_fault_of_the_same_file_is_another_line(damaged, caplog):
    damaged.file.unlink()
    damaged.file.mkdir()
    looks(damaged)
    assert len(said(caplog, "of before")) == 2
    assert said(caplog, "of before")[-1] == damaged.status()["detail"]


def test_the_status_is_as_ever_once_it_is_mended(damaged, caplog):
    damaged.file.write_bytes(damaged.good)
    looks(damaged)
    assert damaged.status()["detail"] == "round 1 is open"
    assert len(said(caplog, f"the {damaged.what} can be read again")) == 1
    damaged.file.write_bytes(b"and again")
    changed(damaged)
    looks(damaged)
    assert str(damaged.file) in damaged.status()["detail"]


def test_what_was_changed_meanwhile_is_done_once_it_can_be_read(world):
    ann, file = world.hand("ann"), file_of(world.home, "members")
    good = file.read_bytes()
    file.write_bytes(b"not a roster")
    with world.ledger.db.transaction() as tx:
        tx.set_device_status("ann", "suspended")
    changed(world)
    looks(world)
    assert world.coordinator.knows("ann")
    file.write_bytes(good)
    looks(world)
    assert not world.coordinator.knows("ann")
    assert ann.listen() == []


def test_keys_that_nobody_can_read_are_told_for_members_too(world):
    """The roster is signed under them."""
    file_of(world.home, "keys").write_bytes(b"no keys")
    changed(world)
    looks(world)
    detail = world.status()["detail"]
    for what in FILES:
        assert f"going on with the {what} of before" in detail


def test_midge_status_tells_a_person_and_a_script(fleet):
    file = file_of(fleet.home, "keys")
    good = file.read_bytes()
    file.write_bytes(b"no keys")
    wait_until(lambda: str(file) in fleet.status()["detail"], "the server sees it")
    told = fleet.midge("status")
    assert told.returncode == 0, told.stderr
    assert f"{file} is damaged" in told.stdout
    listener = fleet.listen(TOPICS.ctl_reply)
    fleet.publish(TOPICS.ctl, json.dumps({"cmd": "status", "id": "mine"}))
    reply = listener.wait_for_json(TOPICS.ctl_reply, id="mine")
    assert str(file) in reply["status"]["detail"]
    whole = file.with_name("whole")
    whole.write_bytes(good)
    os.replace(whole, file)
    wait_until(lambda: str(file) not in fleet.status()["detail"], "it sees that it is mended")
    assert fleet.server.log.count("keys of before") == 1
