"""install.sh in the whole user land of a Raspberry Pi: as root, in `/`, on an emulated processor.

A mount namespace of its own gives Debian's arm64 files the place of `/`, and the kernel hands
their programs to qemu-user; that much needs root here, and is left out without. From a bundle that
`midge bundle` wrote, with the wheels that a Pi gets, to an update in a model of a real server.
Not shown: a kernel of its own, systemd, the speed of a Pi.
"""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.fleets import Fleet, Program, wait_until, write_samples
from tests.pi.debian import fetch_root

NEEDS = ("libstdc++6", "dash", "coreutils", "mawk", "sed", "grep", "passwd", "libc-bin",
         "util-linux")  # fmt: skip
SYSTEMS = {"bookworm": "3.11", "trixie": "3.13"}
BINFMT = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")  # Debian's qemu-user-static has it
# Registered for as long as this machine runs; another registration of the same does no harm.
ENTER = """
set -e
formats=/proc/sys/fs/binfmt_misc
[ -e $formats/register ] || mount -t binfmt_misc binfmt_misc $formats
[ -e $formats/qemu-aarch64 ] || cat "$1" >$formats/register
mount -t proc proc "$2/proc"
mount --bind /dev "$2/dev"
mount --bind "$3" "$2/mnt"
root=$2
shift 3
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin "$@"
"""
INSTALL_S = 1800.0  # most of it is Python compiling NumPy, instruction by instruction


class Board:
    """A user land in a folder, run as root."""

    def __init__(self, suite: str, folder: Path) -> None:
        python = f"python{SYSTEMS[suite]}"
        root = fetch_root(suite, "arm64", (python, f"{python}-venv", "python3", *NEEDS))
        self.root = folder / "root"
        shutil.copytree(root, self.root, symlinks=True)
        # What the packages' own scripts would have done.
        (self.root / "usr/bin/awk").symlink_to("mawk")
        (self.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (self.root / "etc/group").write_text("root:x:0:\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        for name in ("proc", "dev", "tmp", "mnt", "root"):
            (self.root / name).mkdir(exist_ok=True)
        self.log = folder / "board.log"

    def start(self, bundle: Path, *command: str) -> Program:
        """Run a command there, with the bundle in /mnt."""
        return Program(
            self.log, "unshare", "--mount", "sh", "-c", ENTER, "enter", str(BINFMT),
            str(self.root), str(bundle), *command,
        )  # fmt: skip


@pytest.mark.pi
@pytest.mark.parametrize("suite", SYSTEMS)
def test_a_bundle_is_installed_on_a_pi_enrols_and_trains(
    suite: str, fleet: Fleet, tmp_path: Path
) -> None:
    if os.getuid() != 0 or not BINFMT.exists():
        pytest.skip("this needs root, unshare, and Debian's qemu-user-static")
    write_samples(tmp_path / "samples.npz", seed=1)
    out = tmp_path / "bundle.tar.gz"
    done = fleet.midge(
        "bundle", "--device", "ward-3", "--for", f"{suite}-arm64", "-o", str(out),
        "--with", str(tmp_path / "samples.npz"), "--data", "npz:/var/lib/midge/data/samples.npz",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with tarfile.open(out) as archive:
        archive.extractall(tmp_path / "bundle", filter="data")
    board = Board(suite, tmp_path)
    installing = board.start(tmp_path / "bundle" / "midge-ward-3", "sh", "/mnt/install.sh")
    wait_until(lambda: not installing.is_running, "install.sh ends", INSTALL_S)
    assert "midge: installed" in board.log.read_text(), board.log.read_text()
    assert "midge:" in (board.root / "etc/passwd").read_text()
    # Ownership is real here: keys are the service's, settings root's, and readable to the service.
    state, settings = board.root / "var/lib/midge", board.root / "etc/midge/device.toml"
    assert state.stat().st_uid != 0
    assert settings.stat().st_uid == 0
    assert state.stat().st_mode & 0o777 == 0o700
    assert settings.stat().st_gid == state.stat().st_gid

    agent = board.start(
        tmp_path, "setpriv", "--reuid=midge", "--regid=midge", "--clear-groups", "midge-device",
        "run", "--dir", "/var/lib/midge", "--bundle", "/var/lib/midge/device.bundle",
    )  # fmt: skip
    try:
        identity = board.root / "var/lib/midge/identity.json"
        wait_until(identity.exists, "the device enrols", 300.0)
        bundle = board.root / "var/lib/midge/device.bundle"
        wait_until(lambda: not bundle.exists(), "its bundle is erased", 300.0)
        fleet.start_run(rounds=1, target=1, quorum=1, deadline_s=600)
        wait_until(lambda: len(fleet.model_files()) > 1, board.log.read_text(), 300.0)
    finally:
        agent.terminate()
