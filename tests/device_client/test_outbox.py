"""The sealed update on disk: whole or not there, and the same bytes every time."""

import errno
import os
import random
import threading
from pathlib import Path

import pytest

from broker_bridge.errors import LocalError
from broker_bridge.wire.chunks import Layout, seal_chunks, tags_digest
from broker_bridge.wire.envelope import ChunkKey
from broker_bridge.wire.messages import Init
from broker_bridge.wire.update import SealedUpdate
from device_client.outbox import DamagedOutboxError, Outbox
from tests.simulation.disk import SimulatedDisk

MESSAGE = bytes(range(256)) * 20


def update(upload=b"upload-1", key=b"k" * 32):
    layout = Layout(len(MESSAGE), 700)
    chunks = tuple(seal_chunks(MESSAGE, layout, transfer=upload, key=ChunkKey(key)))
    init = Init(
        round=3, announcement=b"a" * 32, upload=upload, enc=b"e" * 32, total_bytes=len(MESSAGE),
        body_bytes=700, tags=tags_digest(chunks), examples=5, train_s=1.0,
    )  # fmt: skip
    return init, SealedUpdate(b"e" * 32, layout, chunks)


def test_what_was_put_comes_back_after_a_restart(tmp_path):
    init, sealed = update()
    Outbox(tmp_path).put(init, sealed)
    again = Outbox(tmp_path)
    assert again.load() == init
    chunks = [again.chunk(init.upload, i) for i in range(sealed.layout.count)]
    assert tuple(chunks) == sealed.chunks


def test_an_empty_outbox_holds_nothing(tmp_path):
    assert Outbox(tmp_path).load() is None


def test_a_newer_update_takes_the_place_of_an_older_one(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(*update())
    init, sealed = update(b"upload-2")
    outbox.put(init, sealed)
    assert Outbox(tmp_path).load() == init
    with pytest.raises(LocalError, match="no longer in the outbox"):
        outbox.chunk(b"upload-1", 0)


def test_what_was_discarded_is_gone(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(*update())
    outbox.discard()
    outbox.discard()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LocalError):
        outbox.chunk(b"upload-1", 0)


def test_an_update_that_is_not_whole_does_not_exist(tmp_path):
    Outbox(tmp_path).put(*update())
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for length in [*range(200), *range(200, len(whole), 311)]:
        path.write_bytes(whole[:length])
        assert Outbox(tmp_path).load() is None, length
        assert not path.exists(), "and is not looked at again"
    path.write_bytes(whole + b"x")
    assert Outbox(tmp_path).load() is None


def test_whoever_only_looks_leaves_a_damaged_update_where_it_is(tmp_path):
    Outbox(tmp_path).put(*update())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    damaged = path.read_bytes()
    with pytest.raises(DamagedOutboxError, match=r"update\.sealed: the update in it is damaged"):
        Outbox(tmp_path).find()
    assert path.read_bytes() == damaged


def test_whoever_only_looks_makes_no_folder(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    assert outbox.find() is None
    outbox.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_is_thrown_away_is_said_once(tmp_path, caplog):
    Outbox(tmp_path).put(*update())
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"")
    outbox = Outbox(tmp_path)
    assert (outbox.load(), outbox.load()) == (None, None)
    (said,) = caplog.messages
    assert str(path) in said
    assert "thrown away" in said


def test_whoever_looks_while_updates_come_and_go_sees_a_whole_one_or_none(tmp_path):
    """`midge-device status` threw away what the agent had just sealed: it opened it three times."""
    over = threading.Event()

    def come_and_go():
        outbox = Outbox(tmp_path)
        for number in range(300):
            outbox.put(*update(b"upload-%d" % (number % 10)))
            if number % 3 == 0:
                outbox.discard()
        over.set()

    writer = threading.Thread(target=come_and_go)
    writer.start()
    seen = set()
    while not over.is_set():
        found = Outbox(tmp_path).find()
        seen.add(found and found.upload)
    writer.join()
    assert len(seen) > 1, "it looked in between"


def test_a_file_that_is_no_update_does_not_exist(tmp_path):
    Outbox(tmp_path).put(*update())
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"another!" + path.read_bytes()[8:])
    assert Outbox(tmp_path).load() is None


def test_neither_key_nor_plaintext_is_on_the_disk(tmp_path):
    Outbox(tmp_path).put(*update(key=b"this-is-the-key-of-the-one-upload"[:32]))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    assert b"this-is-the-key" not in data
    assert bytes(range(32)) not in data
    assert path.stat().st_mode & 0o077 == 0


def test_an_update_that_an_earlier_process_could_not_sync_is_not_lost_once_it_was_found():
    """The card refused to sync the folder once. The next process found the update and would have
    sent it; after a power cut there was none."""
    failing, folder = [], Path("/device/outbox")

    def strike(where, _name):
        if where == "fsync" and failing:
            failing.pop()()

    def refuse():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    init, sealed = update()
    for seed in range(20):
        disk = SimulatedDisk(random.Random(seed), strike)
        disk.mkdir(folder)
        disk.sync_all()
        # The folder's name is synced, and the file; the file's name is not.
        failing[:] = [refuse, lambda: None, lambda: None]
        with pytest.raises(LocalError, match="check it, and replace the card"):
            Outbox(folder, disk=disk).put(init, sealed)
        disk.kill()
        found = Outbox(folder, disk=disk).load()
        disk.power_cut()
        assert Outbox(folder, disk=disk).load() == found == init
