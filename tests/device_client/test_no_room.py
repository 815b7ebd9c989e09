"""A device whose disk is full: it says so, lives on, and takes part again once there is room."""

import errno
import os

import pytest

from broker_bridge.disk import RealDisk
from tests.fleets import write_samples


class SmallDisk(RealDisk):
    """A disk that takes nothing into files whose path holds `full`."""

    full = "nothing is full"

    def pwrite(self, fd, data, offset):
        if self.full in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


@pytest.fixture
def disk():
    return SmallDisk()


@pytest.fixture
def arena(worlds, tmp_path, disk):
    world = worlds(rounds={"deadline_s": 600.0})
    world.person = world.agent("ann", data=write_samples(tmp_path / "ann.npz", seed=1), disk=disk)
    world.settle()
    return world


def closes(world):
    world.until(lambda: world.coordinator.run is None, "the run ends")
    assert world.metrics()["accepted"] == 1


def test_a_full_disk_at_the_announcement_is_sat_out_until_there_is_room(arena, disk):
    disk.full = "/ann/"
    assert arena.tell(cmd="start")["ok"]
    arena.settle()
    assert "the disk is full" in arena.person._participant.detail
    assert arena.status()["round"]["invited"] == 0, "what cannot be written down is not begun"
    arena.pass_time(30)
    disk.full = "nothing is full"
    arena.pass_time(6)
    closes(arena)


def test_an_outbox_that_does_not_fit_is_no_crash(arena, disk):
    """Small files fit and the update does not: the round is sat out, and the next one is not."""
    disk.full = "/outbox/"
    assert arena.tell(cmd="start")["ok"]
    arena.until(lambda: arena.person.state.value == "idle", "the device gives up")
    assert "the disk is full" in arena.person._participant.detail
    assert arena.tell(cmd="stop")["ok"]
    disk.full = "nothing is full"
    assert arena.tell(cmd="start")["ok"]
    closes(arena)


def test_a_disk_that_fills_up_while_training_costs_the_round_only_until_there_is_room(arena, disk):
    assert arena.tell(cmd="start")["ok"]
    arena.until(lambda: arena.person.state.value == "training", "the device trains")
    disk.full = "/ann/"
    arena.until(lambda: "full" in arena.person._participant.detail, "the device finds out")
    disk.full = "nothing is full"
    arena.pass_time(6)
    closes(arena)


def test_a_device_starts_with_a_full_disk(arena, disk):
    boots = arena.person._journal.boot()
    disk.full = "/ann/"
    assert arena.person._journal.boot() == boots + 1
    assert arena.person._journal.boot() == boots + 1, "the number could not be kept"
