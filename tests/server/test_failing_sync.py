"""A disk that says no when a group of updates is to be promised: nothing of it counts yet."""

import errno
import os
import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from broker_bridge.disk import RealDisk
from broker_bridge.task.taskfile import decode_task
from broker_bridge.wire.chunks import chunk_header
from broker_bridge.wire.messages import Go
from broker_bridge.wire.weights import encode
from server import intake
from server.events import Accept, Refused
from server.fleet.expulsion import expel
from server.ledger import Ledger
from tests.fleets import ROOT, TOPICS, World

AIRCRAFT = ROOT / "examples" / "aircraft" / "aircraft.task"  # 10 kB: a chunk each


class Grudging(RealDisk):
    """Refuses some calls that concern the file of small updates."""

    syncs_refused = 0
    room = 1 << 40  # bytes

    def fdatasync(self, fds):
        if self.syncs_refused:
            self.syncs_refused -= 1
            return [OSError(errno.EIO, os.strerror(errno.EIO))] * len(fds)
        return super().fdatasync(fds)

    def pwritev(self, fd, buffers, offset):
        data = b"".join(buffers)[: self.room]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return super().pwritev(fd, [data], offset)

    def pwrite(self, fd, data, offset):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("shared.updates") and not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


class GrudgingWorld(World):
    """Its server's ledger is on such a disk."""

    def __init__(self, folder):
        self.disk = Grudging()
        super().__init__(folder)

    def make_ledger(self):
        return Ledger(self.home, self.config, clock=self.now, disk=self.disk)

    def restart(self):
        self.kill_server()
        self.link.close()
        self.start_server()


@pytest.fixture
def world(tmp_path):
    made = GrudgingWorld(tmp_path)
    shutil.copy(AIRCRAFT, made.home.folder / "tasks")
    yield made
    made.close()


def aircraft_update(scale):
    specs = decode_task(AIRCRAFT.read_bytes())[0].task.weights
    return encode({s.name: np.full(s.shape, 1e-4 * scale, np.float32) for s in specs})


def in_one_chunk(hand, scale):
    (go,) = hand.join(packet_bytes_max=60_000)
    assert isinstance(go, Go)
    init, sealed = hand.seal(go, aircraft_update(scale))
    assert sealed.layout.count == 1
    return init, sealed


@pytest.mark.parametrize("fault", ["sync", "half a write"])
def test_a_group_that_cannot_be_kept_is_asked_for_again_and_counts_once(world, fault):
    hands = [world.hand(f"d{number}") for number in range(6)]
    assert world.tell(cmd="start", task="aircraft", target=7, quorum=1)["ok"]
    ready = [(hand, *in_one_chunk(hand, number)) for number, hand in enumerate(hands)]
    for hand, init, _ in ready:
        hand.commit(init)
    first, others = ready[0], ready[1:]
    assert first[0].send(first[2])[-1].status == "accepted"
    kept = world.ledger._open.sum.digest()

    if fault == "sync":
        world.disk.syncs_refused = 1
    else:
        world.disk.room = 30_000
    for hand, _, sealed in others:
        hand.link.publish(TOPICS.up(0, hand.name, "data"), sealed.chunks[0])
    answers = [hand.listen()[-1] for hand, *_ in others]
    assert {each.status for each in answers} == {"resend" if fault == "sync" else "busy"}
    assert world.ledger._open.sum.digest() == kept
    assert all(world.ledger._spool.lacks(init.upload) for _, init, _ in others)

    world.disk.room = 1 << 40
    world.pass_time(answers[0].retry_after_s + 2)
    for hand, init, sealed in others:
        hand.commit(init)
        assert hand.send(sealed)[-1].status == "accepted"
    total = world.ledger._open.sum.digest()
    assert world.status()["round"]["accepted"] == 6
    world.restart()
    assert world.ledger._open.sum.digest() == total
    assert world.status()["round"]["accepted"] == 6


def test_what_is_summed_is_what_the_disk_has_though_a_chunk_came_again_with_other_bytes(world):
    """A chunk of before a failed sync stayed in memory, and another took its place on the disk."""
    a, b = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", task="wearables", target=3)["ok"]
    init, sealed = a.seal(a.go(), a.delta())
    a.commit(init)
    a.send(sealed, [0])
    world.disk.syncs_refused = 1
    assert b.upload(b.delta()).status == "resend"
    assert 0 in world.ledger._spool.missing(init.upload)

    key = world.ledger._open.uploads[init.upload].key
    header = chunk_header(sealed.chunks[0]).encode()
    other = header + key.seal(0, bytes(sealed.layout.size(0)), header)
    assert a.say("data", other) == []
    (answer,) = a.send(sealed, range(1, sealed.layout.count))
    world.ledger._open._sum_again()  # whatever has a receipt can be read
    assert answer.status == "rejected"


def test_a_full_disk_ends_no_server_that_keeps_no_more_opened_updates_in_memory(world, monkeypatch):
    """What waits to be written was to be read from the disk, so was written first."""
    monkeypatch.setattr(intake, "_OPENED_BYTES_MAX", 0)
    a, _ = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", task="aircraft", target=2)["ok"]
    init, sealed = in_one_chunk(a, 1)
    a.commit(init)
    world.disk.room = 0
    assert a.send(sealed)[-1].status == "busy"
    world.disk.room = 1 << 40
    world.pass_time(7)
    a.commit(init)
    assert a.send(sealed)[-1].status == "accepted"


def test_a_chunk_that_is_torn_on_a_full_disk_is_asked_for_again(world, monkeypatch):
    monkeypatch.setattr(intake, "_OPENED_BYTES_MAX", 0)
    a, _ = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", task="wearables", target=2)["ok"]
    init, sealed = a.seal(a.go(), a.delta())
    a.commit(init)
    for chunk in sealed.chunks:
        world.ledger.put_chunk("a", chunk)
    fd, start = world.ledger._spool._place(init.upload)
    os.pwrite(fd, bytes(100), start + 1000)
    world.disk.room = 0
    (refused,) = world.ledger.accept([Accept("a", init)], at_disk=nullcontext)
    assert isinstance(refused, Refused)
    assert refused.status == "resend"
    assert world.ledger._spool.missing(init.upload) == [0]


def test_what_a_revoked_device_gave_goes_once_there_is_room_to_say_so(world):
    a, b = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", task="wearables", target=3)["ok"]
    assert a.upload(a.delta()).status == b.upload(b.delta()).status == "accepted"
    (kept,) = (u for u, each in world.ledger._open.uploads.items() if each.device == "b")
    world.disk.room = 0
    expel(world.home, world.ledger.db, "a", now=world.now())
    world.pass_time(3)
    assert "full" in world.status()["detail"]
    world.disk.room = 1 << 40
    world.pass_time(3)
    assert "full" not in world.status()["detail"]
    assert world.ledger._spool.uploads() == set(world.ledger._open.uploads) == {kept}
    assert world.status()["round"]["accepted"] == 1
