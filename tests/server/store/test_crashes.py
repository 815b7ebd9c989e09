"""A real SIGKILL before every single thing the store asks of the disk, and after the last.

A scenario runs in a forked child that counts its calls to the operating system and to
SQLite, and kills itself at the n-th. Then this process looks at the files, as the next
server would, and finishes the scenario. This is repeated for every n there is.

A kill loses nothing that the kernel has taken; that fsync comes before the promise is
shown by `test_the_disk_is_asked_before_anything_is_promised`, by the order of the calls.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from broker_bridge.disk import write_atomic
from broker_bridge.wire import weights
from broker_bridge.wire.chunks import Layout, chunk_header, open_chunk, seal_chunks
from broker_bridge.wire.envelope import ChunkKey, sha256
from server.aggregation.exact import ExactSum
from server.store.database import Database
from server.store.models import ModelFiles
from server.store.rows import Device, Model, Receipt, Round, Run
from server.store.spool import Spool

Scenario = Callable[[], None]

# What changes a disk, or asks it to keep its word.
CALLS = {
    "commit", "execute", "fdatasync", "fsync", "mkdir", "open", "pwrite", "pwritev", "rename",
    "unlink", "write",
}  # fmt: skip


def watch(act: Callable[[str], None] | None) -> None:
    """Call `act` before each of CALLS, in this thread and those it starts; None ends it.

    After one call and before the next are the same to a disk: nothing is written in between.
    """

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and act is not None and function.__name__ in CALLS:
            act(function.__name__)

    threading.setprofile(profile if act else None)  # type: ignore[arg-type]
    sys.setprofile(profile if act else None)


def killed_at(number: int, scenario: Scenario) -> bool:
    """Run `scenario` in a child that is killed at its `number`-th point; False if it has fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def act(_call: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            watch(act)
            scenario()
            status = 0
        finally:
            watch(None)
            os._exit(status)
    _, result = os.waitpid(child, 0)
    if os.WIFSIGNALED(result):
        assert os.WTERMSIG(result) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(result) == 0
    return False


def every_crash(
    parent: Path, scenario: Callable[[Path], None], *, start: Path | None = None
) -> Iterator[Path]:
    """The folder, at first a copy of `start`, as it is after a kill at each point there is."""
    number = 1
    while True:
        folder = parent / str(number)
        if start:
            shutil.copytree(start, folder)
        else:
            folder.mkdir()
        if not killed_at(number, lambda folder=folder: scenario(folder)):
            break
        yield folder
        number += 1
    assert number > 5


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: a kill takes nothing from the kernel either way,
    and a thousand syncs cost nothing."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="midge-test-") as folder:
        yield Path(folder)


# ── One file ────────────────────────────────────────────────────────────────────────────


def test_a_file_is_the_old_one_or_the_new_one(scratch: Path) -> None:
    old, new = b"old" * 1000, b"new!" * 1000

    def scenario(folder: Path) -> None:
        write_atomic(folder / "file", old)
        write_atomic(folder / "file", new)

    seen = set()
    for folder in every_crash(scratch, scenario):
        path = folder / "file"
        found = path.read_bytes() if path.exists() else b""
        assert found in {b"", old, new}
        seen.add(found)
        write_atomic(path, new)
        assert [p.name for p in folder.iterdir()] == ["file"]
        assert path.read_bytes() == new
    assert seen == {b"", old, new}


def test_a_database_is_made_whole_or_not_yet(scratch: Path) -> None:
    for folder in every_crash(scratch, lambda folder: Database(folder / "db").close()):
        database = Database(folder / "db")
        with database.transaction() as tx:
            assert tx.next_boot() == 1
        database.close()


# ── A round ─────────────────────────────────────────────────────────────────────────────

KEY = ChunkKey(b"k" * 32)
DEVICES = ["pi-1", "pi-2", "pi-3"]
SHAPE = (40,)
SPECS = (weights.TensorSpec("x", "float32", SHAPE),)


def update_of(device: str) -> tuple[bytes, Layout, list[bytes]]:
    """The upload id, layout and sealed chunks that a device sends, the same at every repeat."""
    seed = int.from_bytes(sha256(device.encode())[:4], "big")
    delta = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    message = weights.encode({"x": delta})
    body_bytes = 70 if device == DEVICES[0] else len(message)  # several chunks, or one
    upload, layout = sha256(device.encode())[:8], Layout(len(message), body_bytes)
    return upload, layout, list(seal_chunks(message, layout, transfer=upload, key=KEY))


def open_the_round(db: Database) -> None:
    with db.transaction() as tx:
        if tx.highest_round():
            return
        for name in DEVICES:
            tx.add_device(
                Device(
                    name=name,
                    sign_public=b"",
                    kem_public=b"",
                    tls_public=b"",
                    psk=b"",
                    enrolled_at=0.0,
                )
            )
        run = tx.add_run(
            Run(
                task_name="t",
                task_digest=b"",
                rounds_total=1,
                target=3,
                quorum=3,
                deadline_s=1.0,
                started_at=0.0,
            )
        )
        tx.open_round(
            Round(
                number=1,
                run_id=run,
                announcement=b"a",
                round_key=b"key",
                model_before=0,
                opened_at=0.0,
            )
        )


def take_updates(db: Database, spool: Spool, promise: Callable[[bytes], None]) -> None:
    """Take every update that has no receipt yet; two of them share a commit."""
    with db.reading() as tx:
        done = {r.upload for r in tx.receipts(1, status="accepted")}
    for group in (DEVICES[:2], DEVICES[2:]):
        uploads = {update_of(d)[0]: d for d in group if update_of(d)[0] not in done}
        for upload, device in uploads.items():
            _, layout, chunks = update_of(device)
            spool.begin(upload, layout)
            for index in spool.missing(upload):
                spool.put(chunk_header(chunks[index]), chunks[index])
        spool.sync(uploads)
        with db.transaction() as tx:
            for upload, device in uploads.items():
                if tx.receipt(upload) is None:
                    tx.add_receipt(
                        Receipt(
                            upload=upload, round=1, device=device, init=b"i", examples=3, at=1.0
                        )
                    )
                tx.settle(upload, "accepted", at=1.0)
        for upload in uploads:
            promise(upload)


def sum_of_accepted(db: Database, spool: Spool) -> ExactSum:
    total = ExactSum(SPECS, fraction_bits=24)
    with db.reading() as tx:
        accepted = tx.receipts(1, status="accepted")
    for receipt in accepted:
        _, layout, _ = update_of(receipt.device)
        spool.begin(receipt.upload, layout)
        assert spool.complete(receipt.upload)
        message = b"".join(open_chunk(c, KEY) for c in spool.chunks(receipt.upload, layout))
        total.add(message, receipt.examples)
    return total


def close_the_round(db: Database, spool: Spool, files: ModelFiles) -> None:
    with db.reading() as tx:
        open_round = tx.current_round()
    if open_round is not None:
        data = weights.encode(sum_of_accepted(db, spool).mean())
        digest = files.write(1, data)
        with db.transaction() as tx:
            tx.add_model(
                Model(
                    version=1,
                    task_digest=b"",
                    digest=digest,
                    size_bytes=len(data),
                    round=1,
                    created_at=1.0,
                )
            )
            tx.close_round(1, model_after=1, closed_at=2.0, summary_json="{}")
    db.checkpoint()
    spool.clear()


def spool_in(folder: Path) -> Spool:
    """Updates are in a file each, or share one: that is in the folder's name."""
    return Spool(folder / "spool", shared_bytes_max=10_000 if "shared" in str(folder) else 0)


def whole_round(folder: Path) -> None:
    """From nothing, or from wherever the last process was killed, to the model."""
    db, spool, files = Database(folder / "db"), spool_in(folder), ModelFiles(folder / "m")
    receipts = os.open(folder / "receipts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    open_the_round(db)
    with db.reading() as tx:
        is_open = tx.current_round() is not None
    if is_open:
        take_updates(db, spool, lambda upload: _say(receipts, upload))
    close_the_round(db, spool, files)
    os.close(receipts)
    spool.close()
    db.close()


def _say(receipts: int, upload: bytes) -> None:
    os.write(receipts, upload)  # what a device has in its hands


def promised(folder: Path) -> set[bytes]:
    path = folder / "receipts"
    data = path.read_bytes() if path.exists() else b""
    return {data[i : i + 8] for i in range(0, len(data), 8)}


def check_promises(folder: Path) -> None:
    """Every receipt that went out is in the database, and its update opens."""
    db, spool = Database(folder / "db"), spool_in(folder)
    with db.reading() as tx:
        current = tx.current_round()
        accepted = {r.upload for r in tx.receipts(1, status="accepted")}
        model = tx.latest_model()
    assert promised(folder) <= accepted
    if current is not None:
        assert model is None
        assert sum_of_accepted(db, spool).count == len(accepted)
    elif accepted:
        assert model is not None
        ModelFiles(folder / "m").read(model.version, model.digest)
    spool.close()
    db.close()


@pytest.mark.parametrize("files", ["own", "shared"])
def test_a_round_ends_in_the_same_bits_wherever_it_is_killed(scratch: Path, files: str) -> None:
    scratch = scratch / files
    scratch.mkdir()
    start, undisturbed = scratch / "start", scratch / "undisturbed"
    start.mkdir()
    database = Database(start / "db")
    open_the_round(database)
    database.close()
    shutil.copytree(start, undisturbed)
    whole_round(undisturbed)
    expected = (undisturbed / "m" / "000001.weights").read_bytes()
    promises = set()
    for folder in every_crash(scratch, whole_round, start=start):
        check_promises(folder)
        promises.add(len(promised(folder)))
        whole_round(folder)
        assert (folder / "m" / "000001.weights").read_bytes() == expected
        assert list((folder / "spool").iterdir()) == []
    assert promises == {0, 1, 2, 3}  # kills fell before, between and after the receipts


@pytest.mark.parametrize("first", [20, 45, 70, 95])
def test_a_round_that_is_killed_again_and_again_ends_in_the_same_bits(
    scratch: Path, first: int
) -> None:
    undisturbed, folder = scratch / "undisturbed", scratch / "killed"
    for path in (undisturbed, folder):
        path.mkdir()
    whole_round(undisturbed)
    number = first
    while killed_at(number, lambda: whole_round(folder)):
        check_promises(folder)
        number += 5  # each time a little further
    assert (folder / "m" / "000001.weights").read_bytes() == (
        undisturbed / "m" / "000001.weights"
    ).read_bytes()


def test_the_disk_is_asked_before_anything_is_promised(scratch: Path) -> None:
    """Each chunk is written, then synced, then committed, and only then is a receipt out."""
    calls: list[str] = []
    watch(calls.append)
    try:
        whole_round(scratch)
    finally:
        watch(None)
    receipt = calls.index("write")
    last_chunk = _last(calls[:receipt], "pwrite")
    synced, commit = calls[last_chunk:receipt], _last(calls[:receipt], "commit")
    assert synced.count("fdatasync") == 2  # one for each update of the group
    assert synced.count("fsync") == 1  # and one for their names
    assert last_chunk < _last(calls[:receipt], "fdatasync") < _last(calls[:receipt], "fsync")
    assert _last(calls[:receipt], "fsync") < commit < receipt

    renamed = calls.index("rename")
    assert calls[renamed - 1] == "fsync"  # the model's bytes before its name
    assert "fsync" in calls[renamed : renamed + calls[renamed:].index("execute")]


def test_a_group_in_one_file_is_written_and_synced_before_anything_is_promised(
    scratch: Path,
) -> None:
    calls: list[str] = []
    folder = scratch / "shared"
    folder.mkdir()
    watch(calls.append)
    try:
        whole_round(folder)
    finally:
        watch(None)
    receipt = calls.index("write")
    written, commit = _last(calls[:receipt], "pwritev"), _last(calls[:receipt], "commit")
    synced = calls[written:receipt]
    assert (synced.count("fdatasync"), synced.count("fsync")) == (1, 1)
    assert written < _last(calls[:receipt], "fdatasync") < _last(calls[:receipt], "fsync")
    assert _last(calls[:receipt], "fsync") < commit < receipt


def _last(calls: list[str], call: str) -> int:
    return max(i for i, found in enumerate(calls) if found == call)
