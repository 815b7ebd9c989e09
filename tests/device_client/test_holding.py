"""One agent for one folder, and the folder stays the one it was."""

import os

import pytest

from broker_bridge.disk import make_folder, write_atomic
from broker_bridge.errors import LocalError
from device_client.events import Memory
from device_client.holding import held
from device_client.journal import Journal


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "device"
    made.mkdir()
    return made


def test_what_is_written_is_there(folder):
    with held(folder) as disk:
        make_folder(folder / "outbox", disk=disk)
        write_atomic(folder / "outbox" / "update.sealed", b"whole", disk=disk)
    assert (folder / "outbox" / "update.sealed").read_bytes() == b"whole"


def test_two_cannot_hold_one_folder_and_one_after_the_other_can(folder):
    with held(folder), pytest.raises(LocalError, match=r"runs in .* already"), held(folder):
        pass
    with held(folder):
        pass


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LocalError, match=r"none: there is no such"), held(tmp_path / "none"):
        pass


def test_nothing_is_written_where_another_folder_took_the_place_of_ours(folder):
    """Under an unmounted disk lies the folder it was mounted on: rounds were written there."""
    away = folder.with_name("away")
    with held(folder) as disk:
        journal = Journal(folder, disk=disk)
        journal.remember(Memory(round=7))
        folder.rename(away)
        folder.mkdir()
        with pytest.raises(LocalError, match="not the folder any more"):
            journal.remember(Memory(round=8))
        with pytest.raises(LocalError, match="not the folder any more"):
            make_folder(folder / "outbox", disk=disk)
        assert os.listdir(folder) == []
        folder.rmdir()
        away.rename(folder)
        assert journal.memory() == Memory(round=7)
        journal.remember(Memory(round=8))
    assert Journal(folder).memory() == Memory(round=8)


def test_a_folder_that_is_gone_is_not_made_again(folder):
    with held(folder) as disk:
        folder.rename(folder.with_name("away"))
        with pytest.raises(LocalError, match="bring it back"):
            make_folder(folder / "outbox", disk=disk)
        assert not folder.exists()
