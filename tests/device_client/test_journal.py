"""What a device writes down beside its identity, and what a failing card makes of it."""

import errno
import os
import random
from pathlib import Path

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.wire.messages import Presence
from device_client.events import Memory
from device_client.journal import Journal
from tests.simulation.disk import SimulatedDisk

FOLDER = Path("/device")


def test_what_is_remembered_is_there_for_the_next_process(tmp_path):
    memory = Memory(round=7, digest=b"d" * 32, done=True, evaluated_version=3)
    Journal(tmp_path).remember(memory)
    assert Journal(tmp_path).memory() == memory


def test_a_device_that_saw_no_round_yet_remembers_none(tmp_path):
    assert Journal(tmp_path).memory() == Memory()
    assert Journal(tmp_path).shown() is None


def test_starts_are_counted(tmp_path):
    assert [Journal(tmp_path).boot() for _ in range(3)] == [1, 2, 3]


def test_what_was_shown_is_read_by_others(tmp_path):
    Journal(tmp_path).show(Presence(state="ready", boot=1, role="train"))
    assert Journal(tmp_path).shown()["state"] == "ready"


def test_a_round_that_an_earlier_process_could_not_sync_is_not_forgotten_any_more():
    """The card refused to sync the folder once. The next process read the round, spoke of it, and
    a power cut took it away."""
    failing = []

    def strike(where, _name):
        if where == "fsync" and failing:
            failing.pop()()

    def refuse():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for seed in range(20):
        disk = SimulatedDisk(random.Random(seed), strike)
        disk.mkdir(FOLDER)
        Journal(FOLDER, disk=disk).remember(Memory(round=1))
        disk.sync_all()
        failing[:] = [refuse, lambda: None]  # the file is synced, its new name is not
        with pytest.raises(LocalError, match="check it, and replace the card"):
            Journal(FOLDER, disk=disk).remember(Memory(round=2))
        disk.kill()
        journal = Journal(FOLDER, disk=disk)
        journal.settle()
        found = journal.memory()
        disk.power_cut()
        assert Journal(FOLDER, disk=disk).memory() == found == Memory(round=2)
