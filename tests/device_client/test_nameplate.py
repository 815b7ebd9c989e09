"""What others may read of a device: told once, when it lasts, whatever its disk says."""

import json
import os
import shutil

import pytest
from msgspec import UNSET

from broker_bridge.errors import LocalError
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.wire.messages import Measured
from broker_bridge.wire.topics import Topics
from device_client.events import Memory
from device_client.holding import held
from device_client.journal import Journal
from device_client.nameplate import Nameplate
from device_client.participant import Participant
from tests.device_client.rounds import device, opening
from tests.device_client.test_no_room import SmallDisk

TOPIC = Topics("demo").state("ann")
MEASURED = Measured(task="t", digest="0" * 16, step_s=0.5, memory_bytes=9, runtime="r", machine="m")


class Street:
    """A broker, a device's folder, and what passers-by read at its door."""

    def __init__(self, folder, disk):
        self.folder = folder
        self.broker = MemoryBroker(seed=1)
        self.link = self.broker.connect("ann")
        self.reader = self.broker.connect("reader")
        self.reader.subscribe([TOPIC])
        self.journal = Journal(folder, disk=disk)
        self.now_s = 100.0
        self.nameplate = Nameplate(TOPIC, self.journal, boot=3, clock=lambda: self.now_s)
        self.person = Participant("ann", memory=Memory(), samples=5, draw=lambda: 0.0)

    def show(self, after_s=0.0, person=None, measured=UNSET):
        self.now_s += after_s
        self.nameplate.show(person or self.person, measured, self.link)
        return self.read()

    def read(self):
        """What was told since the last look."""
        found = []
        while (event := self.reader.receive(0)) is not None:
            if getattr(event, "topic", "") == TOPIC:
                found.append(json.loads(event.payload))
        return found

    @property
    def retained(self):
        return json.loads(self.broker.retained[TOPIC].payload)


@pytest.fixture
def disk():
    return SmallDisk()


@pytest.fixture
def street(tmp_path, disk):
    return Street(tmp_path, disk)


def states(told):
    return [each["state"] for each in told]


def test_a_device_that_the_broker_does_not_know_yet_is_shown_at_once(street):
    (told,) = street.show()
    assert (told["state"], told["boot"], told["role"]) == ("ready", 3, "train")


def test_what_did_not_change_is_told_once(street):
    street.show()
    assert street.show(10.0) == []
    assert street.show(10.0) == []


def test_a_state_is_told_when_it_has_lasted_half_a_second(street):
    street.show()
    street.person.detail = "not now: 80 degrees"
    assert street.show() == []
    assert street.show(0.4) == []
    (told,) = street.show(0.1)
    assert told["detail"] == "not now: 80 degrees"


def test_a_state_that_was_over_before_anyone_could_look_is_never_told(street):
    street.show()
    street.person.detail = "for a moment"
    street.show(0.4)
    street.person.detail = ""
    assert street.show(0.4) + street.show(5.0) == []


def test_a_broker_that_may_have_forgotten_is_told_again_at_once(street):
    street.show()
    street.nameplate.wiped()
    assert states(street.show()) == ["ready"]


def test_what_is_told_is_retained_and_lies_in_the_folder_for_midge_device_status(street):
    street.show(measured=MEASURED)
    assert street.retained == street.journal.shown()
    assert street.retained["measured"]["step_s"] == 0.5


def test_a_reason_is_told_of_a_device_that_waits_and_not_of_one_at_work(street):
    person = device()
    person.step(opening(jitter_s=0.0))  # it joins
    person.detail = "what was before"
    assert street.show(person=person)[0]["detail"] == ""
    street.person.detail = "round 4: accepted"
    assert street.show(1.0) + street.show(1.0) == [street.retained]
    assert street.retained["detail"] == "round 4: accepted"


def test_a_reason_is_cut_to_what_a_message_takes(street):
    street.person.detail = "x" * 10_000
    (told,) = street.show()
    assert told["detail"] == "x" * 500


def test_a_device_that_stops_is_asleep_without_waiting_half_a_second(street):
    street.show()
    street.nameplate.show_asleep(street.person, street.link)
    assert states(street.read()) == ["sleeping"]
    assert street.journal.shown()["state"] == "sleeping"


def test_a_link_that_takes_nothing_is_a_word_in_the_log_and_no_end(street, caplog):
    street.link.close()
    street.show()
    assert any("not sent" in said for said in caplog.messages)
    assert street.journal.shown()["state"] == "ready", "midge-device status says it all the same"
    street.link = street.broker.connect("ann")
    street.nameplate.wiped()  # as the agent does with each new link
    assert states(street.show()) == ["ready"]


def test_a_full_disk_keeps_nothing_from_the_others(street, disk):
    street.show()
    disk.full = "status.json"
    street.person.detail = "the disk is full"
    street.show()
    assert [each["detail"] for each in street.show(1.0)] == ["the disk is full"]
    street.nameplate.show_asleep(street.person, street.link)
    assert street.retained["state"] == "sleeping"


def test_a_device_whose_folder_is_gone_is_asleep_for_the_others_and_not_ready_for_ever(tmp_path):
    """The file came first, and was refused: the broker showed a device at work that had ended."""
    folder = tmp_path / "device"
    folder.mkdir()
    with held(folder) as disk:
        street = Street(folder, disk)
        street.show()
        shutil.rmtree(folder)
        street.person.detail = "news"
        street.show()
        with pytest.raises(LocalError, match="bring it back"):
            street.show(1.0)
        assert street.retained["detail"] == "news"
        street.nameplate.show_asleep(street.person, street.link)
    assert street.retained["state"] == "sleeping"
    assert os.listdir(tmp_path) == []
