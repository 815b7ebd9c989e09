"""A disk that is really full: a file system of two megabytes, in a namespace of its own.

Each test is a script that runs there. What was promised is kept, what does not fit is a
DiskFullError, and once there is room everything goes on in the same process.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MOUNT = 'mount -t tmpfs -o size=2m midge-test "$1" && shift && exec "$@"'

PRELUDE = """
import os, sys
from pathlib import Path
from broker_bridge.disk import DiskFullError, write_atomic

disk = Path(sys.argv[1])

def fill():
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def make_room():
    (disk / "filler").unlink()

def full(action):
    try:
        action()
    except DiskFullError as error:
        assert str(disk) in str(error) and "the disk is full" in str(error), error
        return
    raise AssertionError("the disk took it")
"""


@pytest.fixture(scope="module")
def unshare(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where this user may not mount a file system for itself."""
    folder = tmp_path_factory.mktemp("probe")
    try:
        found = subprocess.run(
            ["unshare", "-rm", "sh", "-c", MOUNT, "sh", folder, "true"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("needs unshare(1), of Linux")
    if found.returncode:
        pytest.skip(f"needs a mount namespace: {found.stderr.decode().strip()}")


def on_a_small_disk(folder: Path, script: str) -> None:
    mine = [sys.executable, "-c", PRELUDE + script, str(folder)]
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, "sh", folder, *mine],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr


def test_a_file_stays_as_it_was(unshare: None, tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
write_atomic(disk / "model", b"old" * 100)
fill()
full(lambda: write_atomic(disk / "model", bytes(100_000)))
assert (disk / "model").read_bytes() == b"old" * 100
assert sorted(p.name for p in disk.iterdir()) == ["filler", "model"]
make_room()
write_atomic(disk / "model", bytes(100_000))
""",
    )


def test_the_database_keeps_what_was_committed_and_goes_on(unshare: None, tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
from server.store.database import Database
db = Database(disk / "midge.db")
with db.transaction() as tx:
    tx.set_meta("kept", "yes")
fill()

def much():
    with db.transaction() as tx:
        for number in range(300):
            tx.set_meta(f"large-{number}", "x" * 10_000)

full(much)
full(much)
with db.reading() as tx:
    assert tx.meta("kept") == "yes" and tx.meta("large-0") is None
make_room()
with db.transaction() as tx:
    assert tx.meta("kept") == "yes" and tx.meta("large-0") is None
    tx.set_meta("large-0", "x" * 10_000)
db.close()
with Database(disk / "midge.db").reading() as tx:
    assert tx.meta("kept") == "yes" and len(tx.meta("large-0")) == 10_000
""",
    )


def test_the_spool_keeps_what_it_has_and_takes_the_rest_later(
    unshare: None, tmp_path: Path
) -> None:
    on_a_small_disk(
        tmp_path,
        """
from broker_bridge.wire.chunks import Layout, chunk_header, seal_chunks
from broker_bridge.wire.envelope import ChunkKey
from server.store.spool import Spool

layout = Layout(400_000, 50_000)
def chunks(upload):
    message = os.urandom(400_000)
    return list(seal_chunks(message, layout, transfer=upload, key=ChunkKey(b"k" * 32)))

spool = Spool(disk / "spool")
one, two = b"upload-1", b"upload-2"
first, second = chunks(one), chunks(two)
spool.begin(one, layout)
for index, chunk in enumerate(first):
    spool.put(chunk_header(chunk), chunk)
spool.sync([one])
spool.begin(two, layout)
spool.put(chunk_header(second[0]), second[0])
fill()
full(lambda: spool.put(chunk_header(second[1]), second[1]))
assert spool.complete(one) and 1 in spool.missing(two) and 0 not in spool.missing(two)
make_room()
for index in spool.missing(two):
    assert spool.put(chunk_header(second[index]), second[index])
spool.sync([two])
spool.close()
again = Spool(disk / "spool")
for upload, sent in ((one, first), (two, second)):
    again.begin(upload, layout)
    assert again.complete(upload)
    assert list(again.chunks(upload, layout)) == sent
""",
    )
