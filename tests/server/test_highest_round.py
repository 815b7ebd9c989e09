"""A round is announced once the second file knows its number, also where the disk is full."""

import errno
import os
from contextlib import closing

import pytest

from broker_bridge.disk import RealDisk
from broker_bridge.link.memory_link import MemoryBroker
from broker_bridge.wire import messages
from broker_bridge.wire.messages import Announcement
from server.ledger import Ledger
from server.store.highest import HighestRound
from tests.fleets import TOPICS, World


class SmallDisk(RealDisk):
    """A disk with room for everything but the file of the highest round, while it is `full`."""

    full = False

    def pwrite(self, fd, data, offset):
        if self.full and "/highest-round" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


class WatchedBroker(MemoryBroker):
    """Looks into the file at the moment in which a round is announced."""

    look = staticmethod(lambda: 0)

    def __init__(self, **options):
        super().__init__(**options)
        self.announced = []  # each round, with what the file knew then

    def route(self, message):
        if message.topic == TOPICS.round and message.payload:
            said = messages.decode(message.payload[64:], Announcement)
            self.announced.append((said.round, self.look()))
        super().route(message)


class SmallWorld(World):
    """Its server's ledger is on a small disk."""

    def __init__(self, folder):
        self.disk = SmallDisk()
        super().__init__(folder, make_broker=WatchedBroker)
        self.broker.look = self.noted

    def make_ledger(self):
        return Ledger(self.home, self.config, clock=self.now, disk=self.disk)

    def noted(self):
        return HighestRound(self.home.state / "highest-round").known

    def written_down(self):
        with self.ledger.db.reading() as tx:
            return [(r.number, r.status) for r in tx.rounds_of(1)]


@pytest.fixture
def world(tmp_path):
    with closing(SmallWorld(tmp_path)) as made:
        made.a = made.hand("a")
        yield made


def test_no_device_hears_of_a_round_before_the_file_knows_it(world):
    assert world.tell(cmd="start", target=1, rounds=3)["ok"]
    for _ in range(3):
        assert world.a.upload(world.a.delta()).status == "accepted"
    assert {number for number, _ in world.broker.announced} == {1, 2, 3}
    assert [each for each in world.broker.announced if each[1] < each[0]] == []


def test_without_room_for_the_file_the_round_waits_and_is_opened_once(world):
    world.disk.full = True
    world.tell(cmd="start", target=1, rounds=1)
    assert world.broker.announced == []
    assert "the disk is full" in world.status()["detail"]
    world.pass_time(10)
    assert world.broker.announced == []
    assert world.written_down() == [(1, "open")]
    world.disk.full = False
    world.pass_time(2)
    assert world.broker.announced == [(1, 1)]
    assert world.a.upload(world.a.delta()).status == "accepted"
    assert world.written_down() == [(1, "closed")]


def test_a_round_that_waits_keeps_the_fleet_key_that_it_was_written_down_with(world):
    world.disk.full = True
    world.tell(cmd="start", target=1, rounds=1)
    before, task = world.ledger.keys.fleet_epoch, world.broker.retained[TOPICS.task(0)]
    world.home.next_epoch()
    world.pass_time(2)
    assert world.ledger.keys.fleet_epoch == before + 1
    assert world.broker.retained[TOPICS.task(0)] == task  # still sealed under the round's key
    world.disk.full = False
    world.pass_time(2)
    assert world.announcement().fleet_epoch == before
    assert world.a.upload(world.a.delta()).status == "accepted"
    assert world.metrics()["state"] == "closed"


@pytest.mark.parametrize("full_again", [False, True])
def test_a_server_that_dies_while_a_round_waits_goes_on_with_it(world, full_again):
    world.disk.full = True
    world.tell(cmd="start", target=1, rounds=1)
    world.kill_server()
    world.disk.full = full_again
    world.start_server()
    assert world.status()["round"]["number"] == 1
    world.disk.full = False
    world.pass_time(2)
    assert world.noted() == 1
    assert world.a.upload(world.a.delta()).status == "accepted"
    assert world.written_down() == [(1, "closed")]


def test_a_start_without_room_takes_nothing_new_until_the_file_is_written(world):
    assert world.tell(cmd="start", target=1, rounds=1)["ok"]
    world.kill_server()
    (world.home.state / "highest-round").unlink()  # as a fleet of an older midge has none
    world.disk.full = True
    world.start_server()
    assert "the disk is full" in world.status()["detail"]
    world.disk.full = False
    world.pass_time(2)
    assert world.noted() == 1
    assert "disk" not in world.status()["detail"]
