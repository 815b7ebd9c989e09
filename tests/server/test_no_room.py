"""A server whose disk is full: it takes nothing new, keeps its promises, and goes on."""

import errno
import os
from contextlib import contextmanager

import pytest

from broker_bridge.disk import DiskFullError, RealDisk
from broker_bridge.wire.messages import Ack, Busy, Need
from server.config import Limits, Rounds, ServerConfig
from server.ledger import Ledger
from server.store.rows import Receipt
from tests.fleets import World


class SmallDisk(RealDisk):
    """A disk that takes no byte more while it is `full`, and says how much is `free`."""

    full = False
    no_models = False  # room for everything but new models
    free = 1_000_000_000

    def pwrite(self, fd, data, offset):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if self.full or (self.no_models and "/models/" in name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


class SmallWorld(World):
    """Its server's ledger is on a small disk."""

    def __init__(self, folder, **limits):
        self.disk = SmallDisk()
        self.limits = Limits(**limits)
        super().__init__(folder)

    def start_server(self):
        self.config = ServerConfig(rounds=Rounds(), limits=self.limits)
        super().start_server()

    def make_ledger(self):
        return Ledger(
            self.home, self.config, clock=self.now, disk=self.disk,
            free_bytes=lambda _: self.disk.free,
        )  # fmt: skip


@pytest.fixture
def small_worlds(tmp_path):
    made = []

    def make(**limits):
        world = SmallWorld(tmp_path, **limits)
        made.append(world)
        world.a, world.b = world.hand("a"), world.hand("b")
        assert world.tell(cmd="start", target=2, rounds=2)["ok"]
        return world

    yield make
    for each in made:
        each.close()


def finishes(world, *devices):
    for device in devices:
        assert device.upload(device.delta()).status == "accepted"
    assert world.metrics()["accepted"] == 2


def test_a_server_with_little_room_lets_nobody_in_says_so_and_goes_on(small_worlds):
    world = small_worlds()
    assert world.a.upload(world.a.delta()).status == "accepted"
    world.disk.free = 1_000_000
    world.pass_time(2)
    (answer,) = world.b.join()
    assert isinstance(answer, Busy)
    assert answer.retry_after_s > 0
    assert "the disk is full: 1 MB are free" in world.status()["detail"]
    world.disk.free = 1_000_000_000
    world.pass_time(2)
    assert "disk" not in world.status()["detail"]
    finishes(world, world.b)


def test_a_commit_is_told_to_wait_while_there_is_no_room(small_worlds):
    world = small_worlds()
    init, sealed = world.a.seal(world.a.go(), world.a.delta())
    world.disk.free = 1_000_000
    (answer,) = world.a.commit(init)
    assert isinstance(answer, Ack)
    assert (answer.status, answer.retry_after_s > 0) == ("busy", True)
    world.disk.free = 1_000_000_000
    world.pass_time(answer.retry_after_s)
    (answer,) = world.a.commit(init)
    assert isinstance(answer, Need)
    assert world.a.send(sealed)[-1].status == "accepted"


def test_a_disk_that_fills_up_in_mid_upload_asks_for_the_rest_later(small_worlds):
    world = small_worlds()
    init, sealed = world.a.seal(world.a.go(), world.a.delta())
    world.a.commit(init)
    world.a.send(sealed, [0])
    world.disk.full = True
    answers = world.a.send(sealed, range(1, sealed.layout.count))
    assert [a.status for a in answers] == ["busy"], "once, not for every chunk"
    assert "full" in world.status()["detail"]
    world.disk.full = False
    world.pass_time(answers[0].retry_after_s)
    (need,) = world.a.commit(init)
    assert not need.bitmap[0] & 1, "the first chunk is here"
    assert world.a.send(sealed, range(1, sealed.layout.count))[-1].status == "accepted"
    finishes(world, world.b)


def test_a_round_that_cannot_be_closed_for_lack_of_room_is_closed_later(small_worlds):
    world = small_worlds()
    assert world.a.upload(world.a.delta()).status == "accepted"
    init, sealed = world.b.seal(world.b.go(), world.b.delta())
    world.b.commit(init)
    last = sealed.layout.count - 1
    world.b.send(sealed, range(last))
    world.disk.no_models = True
    assert world.b.send(sealed, [last])[-1].status == "accepted", "a receipt is kept"
    assert world.ledger.model_version == 1
    assert "full" in world.status()["detail"]
    assert not world.tell(cmd="stop")["ok"]
    world.disk.no_models = False
    world.pass_time(2)
    assert world.metrics()["accepted"] == 2
    assert world.ledger.model_version == 2


def test_a_round_that_cannot_be_closed_survives_a_restart(small_worlds):
    world = small_worlds()
    world.disk.no_models = True
    assert world.a.upload(world.a.delta()).status == "accepted"
    assert world.b.upload(world.b.delta()).status == "accepted"
    assert world.ledger.model_version == 1
    world.kill_server()
    world.disk.no_models = False
    world.start_server()
    world.pass_time(2)
    assert world.ledger.model_version == 2


def test_updates_beyond_their_share_of_the_disk_wait(small_worlds):
    world = small_worlds(spool_mb_max=1)
    size = len(world.ledger.model_bytes)
    assert size < 1_000_000 < 12 * size, "an update fits, a dozen do not"
    world.ledger._spool._bytes += 1_000_000 - size
    init, _ = world.a.seal(world.a.go(), world.a.delta())
    (answer,) = world.a.commit(init)
    assert answer.status == "busy"


@contextmanager
def no_room_for_receipts(world):
    """SQLite may add no page to its file, and those of the receipts are full."""
    db = world.ledger.db

    def pages_at_most(count):
        with db._engine.connect() as connection:
            sql = connection.connection.driver_connection
            sql.execute(f"PRAGMA max_page_count={count}")
            return sql.execute("PRAGMA page_count").fetchone()[0]

    def fill():
        for number in range(10_000):
            with db.transaction() as tx:
                tx.add_receipt(
                    Receipt(
                        upload=number.to_bytes(8, "big"), round=1, device="b", init=b"",
                        status="rejected", examples=0, at=0.0,
                    )
                )  # fmt: skip

    pages_at_most(pages_at_most(1_000_000))
    with pytest.raises(DiskFullError):
        fill()
    yield
    pages_at_most(1_000_000)


def receipts_of(world, device):
    with world.ledger.db.reading() as tx:
        return tx.receipts(1, device=device)


def test_a_rejection_that_could_not_be_written_down_is_written_down_later(worlds):
    world = worlds()
    a, _ = world.hand("a"), world.hand("b")
    assert world.tell(cmd="start", target=2)["ok"]
    init, sealed = a.seal(a.go(), a.delta(), tags=bytes(32))
    a.commit(init)
    with no_room_for_receipts(world):
        assert a.send(sealed)[-1].status == "rejected"
        assert receipts_of(world, "a") == []
    world.pass_time(2)
    assert [each.status for each in receipts_of(world, "a")] == ["rejected"]
    assert "disk" not in world.status()["detail"]
    assert world.ledger._spool.uploads() == set()
