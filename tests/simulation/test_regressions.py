"""Faults that the simulation found, each by the shortest way to it."""

import contextlib
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.link.base import Message
from broker_bridge.wire.chunks import Layout, chunk_header, seal_chunks
from broker_bridge.wire.envelope import ChunkKey
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import SealedUpdate
from device_client.outbox import Outbox
from server.store.spool import Spool
from tests.simulation.disk import SimulatedDisk
from tests.simulation.federation import Federation
from tests.simulation.machines import Parts
from tests.simulation.oracle import ViolationError
from tests.simulation.test_broken_builds import ReceiptBeforeFsync, taking_in
from tests.simulation.weather import Weather

UPLOAD = b"upload-1"
LAYOUT = Layout(total_bytes=1000, body_bytes=400)


def sealed() -> list[bytes]:
    return list(seal_chunks(bytes(1000), LAYOUT, transfer=UPLOAD, key=ChunkKey(bytes(32))))


def disk_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def and_then(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    def both(*given: object, **options: object) -> None:
        first(*given, **options)
        second()

    return both


def test_a_run_whose_model_cannot_be_read_does_not_begin() -> None:
    """The run was written down, the operator told that it failed, and every later start crashed."""
    federation = Federation(Weather.calm())
    server = federation.server
    server.mischief.once.append(("read", "000001.weights", disk_error(errno.EIO)))
    assert federation.run().status == "done"
    assert server.mischief.once == []
    assert server.ended == []
    assert any("the disk reported an error" in line for line in federation.oracle.story)


def test_a_last_model_that_cannot_be_read_at_a_start_is_not_laid_out() -> None:
    """The task was taken up without its model, and the server crashed over a model of no bytes."""
    weather = Weather.calm(devices=2, rounds=1)
    weather.until_s, weather.events = 120.0, [(100.0, "kill", "server")]
    federation = Federation(weather)

    def refuse_once_it_is_down() -> None:
        federation.server.mischief.once.append(("read", "000002.weights", disk_error(errno.EIO)))

    crash = federation.server.crash
    federation.server.crash = and_then(crash, refuse_once_it_is_down)  # type: ignore[method-assign]
    assert federation.run().status == "done"
    assert federation.server.mischief.once == []
    assert federation.server.ended == ["kill"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_log_that_cannot_be_emptied_is_one_sentence(number: int) -> None:
    """Asked without SQLAlchemy, SQLite's own error went through as if it were a bug of ours."""
    federation = Federation(Weather.calm())
    federation.server.mischief.once.append(("checkpoint", "", disk_error(number)))
    assert federation.run().status == "done"
    assert federation.server.mischief.once == []


def test_no_room_to_remove_what_a_round_left_does_not_close_the_round_again() -> None:
    """The model was written down, its round forgotten, and then closed a second time: a crash."""
    federation = Federation(Weather.calm())
    server = federation.server
    faults = [("read", "^models$", disk_error(errno.ENOSPC))]
    faults += [("unlink", "000001.weights|update", disk_error(errno.ENOSPC))]

    def strike_once_it_is_up() -> None:  # it reads the folder when it starts, too
        while faults:
            server.mischief.once.append(faults.pop())

    server.step = and_then(server.step, strike_once_it_is_up)  # type: ignore[method-assign]
    assert federation.run().status == "done"
    assert faults == server.mischief.once == []
    assert server.ended == []


def test_updates_of_a_closed_round_stay_gone_after_a_power_cut() -> None:
    """They came back, one round's on top of another's, and filled the spool."""
    for seed in range(20):
        disk = SimulatedDisk(random.Random(seed))
        disk.mkdir(Path("/state"))
        spool = Spool(Path("/state/spool"), disk=disk)
        spool.begin(UPLOAD, LAYOUT)
        for chunk in sealed():
            spool.put(chunk_header(chunk), chunk)
        spool.sync([UPLOAD])
        spool.clear()
        disk.power_cut()
        assert Spool(Path("/state/spool"), disk=disk).uploads() == set()


def test_updates_stay_gone_though_the_server_was_killed_while_it_removed_them() -> None:
    """They were unlinked and not synced; the next process saw nothing to remove, nor to sync."""
    for seed in range(20):
        disk = SimulatedDisk(random.Random(seed))
        disk.mkdir(Path("/state"))
        spool = Spool(Path("/state/spool"), disk=disk)
        spool.begin(UPLOAD, LAYOUT)
        spool.sync([UPLOAD])
        spool.drop(UPLOAD)
        disk.kill()
        Spool(Path("/state/spool"), disk=disk).clear()
        disk.power_cut()
        assert Spool(Path("/state/spool"), disk=disk).uploads() == set()


@pytest.mark.parametrize("shared_bytes_max", [0, 10_000], ids=["own files", "one file"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_the_disk_would_not_remove_goes_the_next_time(
    number: int, shared_bytes_max: int
) -> None:
    """A slot was forgotten before the write that gave it back: its file stayed behind."""
    for point in range(8):
        disk = SimulatedDisk(random.Random(1))
        disk.mkdir(Path("/state"))
        spool = Spool(Path("/state/spool"), shared_bytes_max=shared_bytes_max, disk=disk)
        uploads = [bytes([each]) * 8 for each in range(3)]
        for upload in uploads:
            spool.begin(upload, LAYOUT)
        points: list[str] = []

        def strike(what: str, name: str, at: int = point, seen: list[str] = points) -> None:
            if what in ("write", "unlink", "fsync"):
                seen.append(what)
                if len(seen) == at + 1:
                    raise disk_error(number)

        disk.strike = strike
        with contextlib.suppress(LocalError):
            spool.clear()
        disk.strike = lambda *_: None
        spool.clear()
        assert disk.names(spool.folder) == []
        assert (spool.uploads(), spool.bytes_held) == (set(), 0)


def test_an_update_with_a_receipt_that_cannot_be_read_ends_the_server_with_a_sentence() -> None:
    """It came up with a traceback. There is no honest model of that round without the update."""
    said: list[str] = []
    for seed in range(150):
        federation = Federation(Weather.of(seed), Parts(taking_in(ReceiptBeforeFsync)))
        try:
            federation.run()
        except ViolationError:
            said = federation.server.ended
            break
    assert any("has a receipt and cannot be read" in sentence for sentence in said)


def test_a_sealed_update_survives_a_power_cut_in_a_new_outbox() -> None:
    """The folder was made and never synced: its name could go, and the update with it."""
    for seed in range(20):
        disk = SimulatedDisk(random.Random(seed))
        disk.mkdir(Path("/device"))
        disk.sync_all()
        outbox = Outbox(Path("/device/outbox"), disk=disk)
        outbox.put(an_init(), SealedUpdate(bytes(32), LAYOUT, tuple(sealed())))
        disk.power_cut()
        assert Outbox(Path("/device/outbox"), disk=disk).load() == an_init()


def test_a_damaged_outbox_is_thrown_away_unread() -> None:
    """Its first bytes told how much memory to ask for: up to 4 GB."""
    disk = SimulatedDisk(random.Random(1))
    disk.mkdir(Path("/device"))
    outbox = Outbox(Path("/device/outbox"), disk=disk)
    outbox.put(an_init(), SealedUpdate(bytes(32), LAYOUT, tuple(sealed())))
    fd = disk.open(Path("/device/outbox/update.sealed"), os.O_RDWR)
    disk.pwrite(fd, b"\xff\xff\xff\xff", 8)
    disk.pwrite(fd, b"\xff\xff\xff\xff", 8)
    assert Outbox(Path("/device/outbox"), disk=disk).load() is None


def test_a_folder_of_tasks_that_cannot_be_read_is_named() -> None:
    federation = Federation(Weather.calm())
    federation.server.mischief.once.append(("read", "^tasks$", disk_error(errno.EACCES)))
    assert federation.run().status == "done"
    assert any("tasks: permission was refused" in line for line in federation.oracle.story)


def an_init() -> Init:
    return Init(
        round=1, announcement=bytes(32), upload=UPLOAD, enc=bytes(32), total_bytes=1000,
        body_bytes=400, tags=bytes(32), examples=1, train_s=0.0, metrics={},
    )  # fmt: skip


def test_a_stop_that_comes_with_the_last_chunk_ends_the_run() -> None:
    """The round was abandoned with an update between disk and sum, and the server crashed."""
    federation = Federation(Weather.calm(devices=2, rounds=1))
    told, turn, sent = federation.broker.observe, federation.server.step, []

    def observe(message: Message) -> None:
        told(message)
        if message.topic.endswith("/data") and chunk_header(message.payload).index == 2:
            sent.append(message)

    def stop_behind_the_last_chunk(event: object) -> None:
        if sent:
            sent.clear()
            federation.operator.say("stop")
        turn(event)

    federation.broker.observe = observe
    federation.server.step = stop_behind_the_last_chunk
    assert federation.run().status == "stopped"
