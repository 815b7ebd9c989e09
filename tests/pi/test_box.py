"""`midge bundle` on a Debian machine with a systemd of its own: the commands that docs name.

Installed, enrolled, trained; upgraded with an update in its outbox; killed; removed. As root, and
with real units: what a folder cannot show (tests/flow/test_bundle.py).
"""

import hashlib
import os
import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cards
from tests.fleets import Fleet, wait_until, write_samples
from tests.pi.box import Box

MACHINES = {"x86_64": ("bookworm-x86-64", "amd64"), "aarch64": ("bookworm-arm64", "arm64")}
UNIT = "midge-device.service"
STATE = "var/lib/midge"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """Debian 12, started."""
    if os.getuid() != 0:
        cards.leave_out("this needs root: control groups and mounts of its own")
    made = Box("bookworm", MACHINES[platform.machine()][1], tmp_path)
    yield made
    made.stop()


def unpacked(fleet: Fleet, box: Box, *options: str) -> str:
    """A bundle, unpacked on the box as a person does it; how install.sh is called there."""
    out = fleet.folder / "bundle.tar.gz"
    target = MACHINES[platform.machine()][0]
    done = fleet.midge("bundle", "--for", target, "-o", str(out), *options)
    assert done.returncode == 0, done.stderr
    with tarfile.open(out) as archive:
        archive.extractall(box.root / "srv", filter="data")
        return f"/srv/{archive.getnames()[0].split('/')[0]}/install.sh"


def sums(box: Box) -> list[str]:
    names = ("identity.json", "outbox/update.sealed")
    return [hashlib.sha256((box.root / STATE / n).read_bytes()).hexdigest() for n in names]


@pytest.mark.pi
def test_a_bundle_lives_on_a_debian_machine_from_its_installation_to_its_end(
    fleet: Fleet, box: Box, tmp_path: Path
) -> None:
    samples = tmp_path / "samples.npz"
    write_samples(samples, seed=1, rows=12_000)  # trains for seconds: time to freeze the server
    data = f"npz:/{STATE}/data/samples.npz"
    script = unpacked(fleet, box, "--device", "ward-3", "--with", str(samples), "--data", data)
    done = box.run(script)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until((box.root / STATE / "identity.json").exists, "it enrols")
    wait_until(lambda: "is erased" in box.journal(UNIT), "its bundle is erased")
    assert not (box.root / STATE / "device.bundle").exists()
    wait_until(lambda: box.shown(UNIT, "ActiveState") == "active", "systemd hears that it is ready")
    for name, value in (("Type", "notify"), ("User", "midge"), ("WatchdogUSec", "2min")):
        assert box.shown(UNIT, name) == value
    assert box.shown(UNIT, "MemoryMax").isdecimal(), "a limit, and not infinity"

    # An update that cannot leave: upgraded meanwhile, it is the same one that arrives.
    fleet.start_run(rounds=1, target=1, quorum=1, deadline_s=3600)
    wait_until(lambda: "round 1: training" in box.journal(UNIT), "it trains")
    assert fleet.server is not None
    fleet.server.freeze()
    try:
        outbox = box.root / STATE / "outbox/update.sealed"
        wait_until(outbox.exists, "the update is in the outbox")
        assert len(fleet.model_files()) == 1
        before, process = sums(box), box.shown(UNIT, "MainPID")
        done = box.run(unpacked(fleet, box))
        assert "keeps its identity and its outbox" in done.stdout, done.stdout + done.stderr
        wait_until(lambda: box.shown(UNIT, "MainPID") not in ("0", process), "it starts anew")
        assert sums(box) == before
    finally:
        fleet.server.thaw()
    wait_until(lambda: len(fleet.model_files()) == 2, "the update arrives")
    assert box.journal(UNIT).count("round 1: training") == 1

    process = box.shown(UNIT, "MainPID")
    box.run("kill", "-9", process)
    wait_until(lambda: box.shown(UNIT, "NRestarts") == "1", "systemd starts it again")

    done = box.run("/opt/midge/uninstall.sh")
    assert "identity and settings are still in" in done.stdout, done.stderr
    assert box.shown(UNIT, "LoadState") == "not-found"
    assert not (box.root / "opt/midge").exists()
    assert (box.root / STATE / "identity.json").exists()
    done = box.run(script.replace("install.sh", "uninstall.sh"), "--purge")
    assert done.returncode == 0, done.stderr
    assert not (box.root / STATE).exists()
    assert "midge" not in (box.root / "etc/passwd").read_text()
    assert box.run("systemctl", "--failed", "--quiet", "--plain").stdout.strip() == ""
