"""The server's state on a disk that is full: nothing that was promised is lost, and it goes on."""

import os
import shutil
import subprocess

import pytest

from broker_bridge.link.local_broker import find_mosquitto
from tests.fleets import TOPICS, wait_until

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")

NAMES = ("ann", "ben")
DISK_MB = 8


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes. Only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        pytest.skip(f"no small file system can be made here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, *, leave_bytes):
    """Somebody else fills the disk."""
    stuff = folder / "stuff"
    with stuff.open("wb") as file:
        free = shutil.disk_usage(folder).free
        file.write(bytes(max(0, free - leave_bytes)))
        file.flush()
        if leave_bytes == 0:
            with pytest.raises(OSError, match="No space"):
                os.write(file.fileno(), bytes(1_000_000))
    return stuff


def fleet_on(fleets, small_disk, settings):
    fleet = fleets(settings=settings)
    state = fleet.home.state
    shutil.copytree(state, small_disk / "state")
    shutil.rmtree(state)
    state.symlink_to(small_disk / "state")
    fleet.start()
    fleet.enrol(*NAMES)
    return fleet


def all_ready(fleet, *names):
    """Wait until the broker has said so: who is frozen then has been heard of."""
    listener = fleet.listen(TOPICS.all_states)
    for name in names:
        listener.wait_for_json(TOPICS.state(name), state="ready")


def is_told_to_wait(fleet, device, name):
    """Whether the server has no room for its update, or, if it saw that first, for its join."""
    return "busy" in device.said or "no room" in fleet.state_of(name).get("detail", "")


def test_a_server_that_runs_out_of_room_keeps_receipts_and_goes_on_when_there_is_some(
    fleets, small_disk
):
    fleet = fleet_on(fleets, small_disk, "[limits]\ndisk_free_mb_min = 0\n")
    ann, ben = (fleet.device(name) for name in NAMES)
    all_ready(fleet, *NAMES)
    ben.freeze()
    fleet.start_run(rounds=1, target=2, quorum=2)
    ann.wait_for("accepted")
    stuff = fill(small_disk, leave_bytes=0)
    ben.thaw()
    wait_until(lambda: is_told_to_wait(fleet, ben, "ben"), "ben is told")
    wait_until(lambda: "full" in fleet.status()["detail"], "the server says so")
    assert fleet.status()["round"]["accepted"] == 1
    assert fleet.server.is_running
    stuff.unlink()
    wait_until(lambda: "round 1 closed: 2 updates" in fleet.server.log, "the round ends")
    assert ann.log.count("trained") == ben.log.count("trained") == 1
    assert "full" not in fleet.status()["detail"]


def test_a_server_lets_nobody_in_while_less_than_its_reserve_is_free(fleets, small_disk):
    fleet = fleet_on(fleets, small_disk, "[limits]\ndisk_free_mb_min = 4\n")
    ann = fleet.device("ann")
    all_ready(fleet, "ann")
    stuff = fill(small_disk, leave_bytes=2_000_000)
    wait_until(lambda: "the disk is full" in fleet.status()["detail"], "the server says so")
    fleet.start_run(rounds=1)
    wait_until(lambda: "run 1 of task wearables started" in fleet.server.log, "the run begins")
    assert "the disk is full" in fleet.status()["detail"]
    assert "round 1" not in fleet.server.log
    stuff.unlink()
    wait_until(lambda: "round 1 closed: 1 updates" in fleet.server.log, "the round ends")
    assert ann.is_running


def test_a_server_that_was_killed_with_a_full_disk_finishes_its_round_later(fleets, small_disk):
    fleet = fleet_on(fleets, small_disk, "[limits]\ndisk_free_mb_min = 0\n")
    ann, ben = (fleet.device(name) for name in NAMES)
    all_ready(fleet, *NAMES)
    ben.freeze()
    fleet.start_run(rounds=1, target=2, quorum=2)
    ann.wait_for("accepted")
    stuff = fill(small_disk, leave_bytes=0)
    fleet.server.kill()
    stuff.unlink()
    fleet.start_server()
    ben.thaw()
    wait_until(lambda: "round 1 closed: 2 updates" in fleet.server.log, "the round ends")
    assert ann.log.count("trained") == 1


def test_a_stop_that_cannot_be_written_down_is_not_called_done(fleets, small_disk):
    fleet = fleet_on(fleets, small_disk, "[limits]\ndisk_free_mb_min = 0\n")
    ann = fleet.device("ann")
    all_ready(fleet, "ann")
    ann.freeze()
    fleet.start_run(rounds=1)
    fleet.server.wait_for("round 1 is open")
    stuff = fill(small_disk, leave_bytes=0)
    refused = fleet.midge("stop")
    assert refused.returncode == 2
    assert "the disk is full" in refused.stderr
    assert "a restart would undo this stop" in refused.stderr
    stuff.unlink()
    wait_until(lambda: "full" not in fleet.status()["detail"], "it is written down")
    fleet.server.kill()
    fleet.start_server()
    assert "run" not in fleet.status()


def test_a_device_whose_disk_is_full_says_so_and_takes_part_again_later(
    fleets, small_disk, tmp_path
):
    fleet = fleets().start()
    fleet.enrol("ann")
    shutil.copytree(fleet.folder / "ann", small_disk / "ann")
    shutil.rmtree(fleet.folder / "ann")
    (fleet.folder / "ann").symlink_to(small_disk / "ann")
    listener = fleet.listen(TOPICS.all_states, TOPICS.metrics)
    ann = fleet.device("ann")
    listener.wait_for_json(TOPICS.state("ann"), state="ready")
    stuff = fill(small_disk, leave_bytes=0)
    fleet.start_run(rounds=1)
    listener.wait(lambda m: b"the disk is full" in m.payload, "the device says so")
    assert ann.is_running
    stuff.unlink()
    listener.wait_for_json(TOPICS.metrics, round=1, state="closed", accepted=1)
