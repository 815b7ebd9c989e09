"""Files that are whole, on a real disk, with real kills."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker_bridge.disk import (
    DiskFullError,
    disk_errors,
    erase,
    sync_folder,
    write_all,
    write_atomic,
)
from broker_bridge.errors import LocalError

ROOT = Path(__file__).parents[2]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    write_atomic(path, b"first")
    write_atomic(path, b"second, longer")
    assert path.read_bytes() == b"second, longer"
    assert [p.name for p in tmp_path.iterdir()] == ["identity"]


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_the_one_asked_for_whatever_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "key", b"secret", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == mode


def test_a_secret_is_not_readable_by_others_unless_asked_for(tmp_path: Path) -> None:
    write_atomic(tmp_path / "key", b"secret")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_what_an_interrupted_write_left_behind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.new").write_bytes(b"half of a mod")
    write_atomic(tmp_path / "model", b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_bytes() == b"whole"


def test_a_link_in_the_place_of_the_new_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "model.new").symlink_to(victim)
    write_atomic(tmp_path / "model", b"yours")
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "model").is_symlink()


def test_what_is_erased_is_overwritten_and_gone_and_no_link_is_followed(tmp_path: Path) -> None:
    path, other_name, link = (tmp_path / name for name in ("secret", "same file", "link"))
    path.write_bytes(b"token" * 1000)
    other_name.hardlink_to(path)
    link.symlink_to(path)
    with pytest.raises(LocalError, match="link"):
        erase(link)
    assert path.read_bytes() == b"token" * 1000
    erase(path)
    assert not path.exists()
    assert other_name.read_bytes() == bytes(5000)
    with pytest.raises(LocalError, match="no such file"):
        erase(path)


def test_a_missing_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "model"
    with pytest.raises(LocalError, match="nowhere/model: there is no such file or folder; create"):
        write_atomic(path, b"x")
    with pytest.raises(LocalError, match="nowhere: there is no such"):
        sync_folder(path.parent)


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalError, match="a part of the path is not a folder"):
        write_atomic(tmp_path / "file" / "model", b"x")


def test_a_folder_where_the_file_should_be_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(LocalError, match="this is a folder"):
        write_atomic(tmp_path / "model", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_its_own_error() -> None:
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    with (
        path.open("wb", buffering=0) as full,
        pytest.raises(DiskFullError, match="disk is full"),
        disk_errors(path),
    ):
        write_all(full.fileno(), b"x", 0)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission"),
        (errno.EIO, "the disk reported an error"),
        (errno.EXDEV, "check the disk"),
    ],
)
def test_each_refusal_says_what_to_do(number: int, advice: str) -> None:
    with pytest.raises(LocalError, match=advice) as caught, disk_errors(Path("/data/model")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith("/data/model: ")
    assert not isinstance(caught.value, DiskFullError)


def test_a_write_that_breaks_off_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_atomic(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel takes the first 64 KiB and refuses the rest, as a disk that fills up does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(LocalError, match="model: "):
            write_atomic(path, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


WRITER = """
import sys
from pathlib import Path
from broker_bridge.disk import write_atomic
path, number = Path(sys.argv[1]), int(sys.argv[2])
while True:
    number += 1
    write_atomic(path, f"{number:08d}".encode() * 50_000)
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file_no_older_than_it_said(tmp_path: Path) -> None:
    path, number = tmp_path / "model", 0
    for kill in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(1 + kill % 4)][-1]
        child.send_signal(signal.SIGKILL)
        child.communicate()
        data = path.read_bytes()
        number = int(data[:8])
        assert data == f"{number:08d}".encode() * 50_000
        assert number >= said
