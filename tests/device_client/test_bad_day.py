"""A bad day of a device's owner, with real processes: each trouble is one sentence, and the
device takes part again when it is over."""

import json
import os
import subprocess

import pytest

from tests.fleets import TOPICS, Fleet, wait_until


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("bad-day"), settings="[rounds]\ntarget = 1\nquorum = 1")
    try:
        made.start()
        made.heard = made.listen(TOPICS.metrics, TOPICS.all_states, who="server")
        made.last = 0
        yield made
    finally:
        made.stop()


def opens(fleet):
    """A round that waits for its one device."""
    fleet.last += 1
    fleet.start_run(task="wearables", rounds=1, target=1, quorum=1)


def closes(fleet):
    fleet.heard.wait_for_json(TOPICS.metrics, round=fleet.last, state="closed", accepted=1)


def begun(fleet, name, **options):
    """A device that has enrolled, and is connected."""
    fleet.enrol(name)
    device = fleet.device(name, **options)
    device.wait_for("connected to the broker")
    return device


@pytest.fixture
def cards(fleet):
    """Makes folders of devices on disks of their own. Only root can mount one."""
    made = []

    def make(name):
        folder = fleet.folder / name
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "midge-test", str(folder)]
        tried = subprocess.run(mount, capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()}")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def ended(device, *words):
    """It ended by itself, with one sentence that has these words."""
    wait_until(lambda: not device.is_running, "it ends")
    assert device.terminate() == 2
    last = device.said.splitlines()[-1]
    assert last.startswith("midge-device: ")
    for word in words:
        assert word in last
    assert "Traceback" not in device.said


def written(fleet, name):
    """The highest round that a device has seen, and whether it is done with it."""
    found = json.loads((fleet.folder / name / "rounds.json").read_text())
    return found["round"], found["done"]


def test_a_folder_that_another_took_the_place_of_is_left_alone_and_is_whole_when_it_is_back(fleet):
    """A disk that is unmounted lays open the folder it was mounted on: rounds were kept there."""
    device = begun(fleet, "moved")
    opens(fleet)
    closes(fleet)
    wait_until(lambda: written(fleet, "moved") == (fleet.last, True), "it is written down")
    folder = fleet.folder / "moved"
    away = folder.rename(fleet.folder / "moved-away")
    folder.mkdir()
    opens(fleet)
    ended(device, str(folder), "not the folder any more", "bring it back")
    assert os.listdir(folder) == []
    fleet.heard.wait_for_json(TOPICS.state("moved"), state="sleeping")
    folder.rmdir()
    away.rename(folder)
    assert written(fleet, "moved") == (fleet.last - 1, True)
    device = fleet.device("moved")
    closes(fleet)
    device.terminate()
    assert written(fleet, "moved") == (fleet.last, True)


def test_a_card_that_turns_read_only_ends_a_device_with_its_name_and_nobody_waits_for_it(
    fleet, cards
):
    """The broker showed it as ready for ever: it could not write down that it was asleep."""
    card = cards("worn")
    device = begun(fleet, "worn")
    subprocess.run(["mount", "-o", "remount,ro", str(card)], check=True)
    opens(fleet)
    ended(device, str(card), "the file system is read-only", "check the card")
    fleet.heard.wait_for_json(TOPICS.state("worn"), state="sleeping")
    ended(fleet.device("worn"), "the file system is read-only")
    subprocess.run(["mount", "-o", "remount,rw", str(card)], check=True)
    device = fleet.device("worn")
    closes(fleet)
    device.terminate()


def test_a_card_that_is_full_is_waited_for_and_said_once(fleet, cards):
    filler = cards("full") / "filler"
    device = begun(fleet, "full")
    fills = ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"]
    filled = subprocess.run(fills, capture_output=True, text=True, check=False)
    assert "No space left" in filled.stderr
    opens(fleet)
    device.wait_for("the disk is full; make room there, then this goes on by itself")
    filler.unlink()
    closes(fleet)
    assert device.is_running
    assert device.said.count("the disk is full") == 1
    device.terminate()


SENSOR = """
import pathlib, time
from tests.device_client.sandbox.sources import samples

HERE = pathlib.Path(__file__).parent

def calm():
    (HERE / "waits").touch()
    while not (HERE / "go").exists():
        time.sleep(0.02)
    return samples(rows=40_000)
"""


def test_a_device_that_is_stopped_in_mid_training_trains_the_round_again(fleet):
    folder = fleet.folder
    (folder / "sensor.py").write_text(SENSOR)
    (folder / "go").touch()
    fleet.enrol("busy")
    device = fleet.device("busy", data=f"{folder / 'sensor.py'}:calm")
    device.wait_for("connected to the broker")
    opens(fleet)
    device.wait_for(f"round {fleet.last}: training")
    assert device.terminate() == 0
    assert "training stopped: the device is stopping" in device.said
    assert f"round {fleet.last}: trained" not in device.said
    fleet.heard.wait_for_json(TOPICS.state("busy"), state="sleeping")
    device = fleet.device("busy")
    closes(fleet)
    device.terminate()


def test_a_device_that_is_stopped_while_it_waits_for_its_samples_takes_the_round_up_again(fleet):
    """It took the stop for a fault of the data, and the round was over for it."""
    folder = fleet.folder
    (folder / "sensor.py").write_text(SENSOR)
    (folder / "go").unlink(missing_ok=True)
    (folder / "waits").unlink(missing_ok=True)
    fleet.enrol("late")
    device = fleet.device("late", data=f"{folder / 'sensor.py'}:calm")
    device.wait_for("connected to the broker")
    opens(fleet)
    wait_until((folder / "waits").exists, "it waits for its samples")
    assert device.terminate() == 0
    assert f"the data source {folder / 'sensor.py'}:calm was still at work" in device.said
    assert "cannot use the announced task" not in device.said
    device = fleet.device("late")
    closes(fleet)
    device.terminate()
