"""A bundle on a bare machine: installed without pip and internet, enrolled, trained, upgraded."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests import cards
from tests.fleets import Program, is_refusal, run, wait_until, write_samples


@pytest.fixture
def root(tmp_path):
    """Where the device's file system is, in a folder."""
    return tmp_path / "root"


def unpacked(fleet, tmp_path, *options):
    """What `midge bundle` writes for this machine, unpacked as a person does it."""
    target = cards.target_of_this_machine()
    cards.wheels_or_skip(target)
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar.gz"
    done = fleet.midge("bundle", "--for", target.name, "-o", str(out), "--json", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == out.stat().st_size
    folder = out.with_suffix(".unpacked")
    with tarfile.open(out) as archive:
        archive.extractall(folder, filter="data")
        secret = [e.mode for e in archive if "/data/" in e.name or e.name.endswith(".bundle")]
    assert set(secret) <= {0o600}, "readable for whoever else is on that machine"
    (top,) = folder.iterdir()
    return top


def install(bundle, root, *options):
    return run(str(bundle / "install.sh"), "--root", str(root), "--python", sys.executable,
               *options, env={"PATH": os.environ["PATH"]})  # fmt: skip


def test_a_bundle_is_installed_enrols_trains_and_is_upgraded(fleet, tmp_path, root):
    samples = tmp_path / "samples.npz"
    write_samples(samples, seed=1)
    bundle = unpacked(
        fleet, tmp_path, "--device", "ward-3", "--with", str(samples), "--task-cache",
        "--data", "npz:/var/lib/midge/data/samples.npz",
    )  # fmt: skip
    done = install(bundle, root)
    assert done.returncode == 0, done.stderr
    assert f"remove {bundle}, and what it was unpacked from" in done.stdout
    state = root / "var" / "lib" / "midge"
    assert (root / "etc" / "midge" / "device.toml").stat().st_mode & 0o777 == 0o640
    assert (state / "device.bundle").stat().st_mode & 0o777 == 0o600
    assert "samples.npz" in (root / "etc/midge/device.toml").read_text()
    assert list((state / "tasks").glob("*.plan"))

    # In an empty environment and another folder: nothing of this checkout is in reach.
    agent = Agent(root, tmp_path / "agent.log")
    try:
        agent.start()
        wait_until((state / "identity.json").exists, "the device enrols")
        wait_until(lambda: not (state / "device.bundle").exists(), "its bundle is erased")
        fleet.start_run(rounds=1, target=1, quorum=1)
        wait_until(lambda: len(fleet.model_files()) > 1, "a model of a round")
        agent.program.terminate()
        # An upgrade keeps who the device is, and what its owner set.
        (root / "etc" / "midge" / "device.toml").write_text(f'data = "npz:{samples}"\n')
        was = (state / "identity.json").read_bytes()
        upgrade = unpacked(fleet, tmp_path)
        assert not (upgrade / "device.bundle").exists()
        done = install(upgrade, root)
        assert done.returncode == 0, done.stderr
        assert "already, as ward-3: it keeps its identity" in done.stdout
        assert "secret" not in done.stdout, "there is none in an upgrade"
        assert (state / "identity.json").read_bytes() == was
        assert str(samples) in (root / "etc/midge/device.toml").read_text()
        agent.start(data=False)
        fleet.start_run(rounds=1, target=1, quorum=1)
        wait_until(lambda: len(fleet.model_files()) > 2, "a model of a second round")
    finally:
        agent.program.kill()

    removed = run("sh", str(root / "opt/midge/uninstall.sh"), "--root", str(root))
    assert removed.returncode == 0, removed.stderr
    assert not (root / "opt" / "midge").exists()
    assert (state / "identity.json").exists()
    run("sh", str(bundle / "uninstall.sh"), "--root", str(root), "--purge")
    assert not state.exists()
    again = run("sh", str(bundle / "uninstall.sh"), "--root", str(root))
    assert "nothing of midge here" in again.stdout


class Agent:
    """The agent that install.sh put into a folder."""

    def __init__(self, root, log):
        self.root, self.log = root, log

    def start(self, *, data=True):
        state = self.root / "var" / "lib" / "midge"
        source = ("--data", f"npz:{state}/data/samples.npz") if data else ()
        self.program = Program(
            self.log, "env", "-i", "-C", "/", "PATH=/usr/bin:/bin",
            str(self.root / "usr/local/bin/midge-device"), "run", "--dir", str(state),
            "--bundle", str(state / "device.bundle"), *source,
        )  # fmt: skip


# ── What is refused ─────────────────────────────────────────────────────────────────────


def test_installing_again_changes_nothing(alone, tmp_path, root):
    bundle = unpacked(alone, tmp_path, "--device", "ward-3")
    assert install(bundle, root).returncode == 0
    (software,) = (root / "opt/midge/releases").iterdir()
    before = {path: path.stat().st_mtime_ns for path in software.rglob("*.py")}
    again = install(bundle, root)
    assert again.returncode == 0, again.stderr
    assert "installed already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in software.rglob("*.py")} == before
    # Compiled once, since the service's user may not do it at each start.
    sources = [path for path in software.rglob("*.py") if path.parent.name == "device_client"]
    assert all((p.parent / "__pycache__").glob(f"{p.stem}.*.pyc") for p in sources)

    # A version that does not arrive whole leaves the old one at work.
    wheel = next(bundle.glob("wheels/*/midge-*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-9] + b"not these")
    refused = install(bundle, root)
    assert refused.returncode == 1
    assert "damaged" in refused.stderr
    version = run("env", "-C", "/", str(root / "usr/local/bin/midge-device"), "--version")
    assert version.returncode == 0, version.stderr


@pytest.fixture
def alone(fleets):
    """A fleet of which nothing runs."""
    return fleets()


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("cp311 32 armv7l", "32-bit system"),
        ("cp312 64 riscv64", "this bundle is for cp"),
    ],
)
def test_a_machine_that_it_is_not_for_is_refused_in_a_sentence(tmp_path, root, says, words):
    # A Python of a machine that we do not have, as far as install.sh asks it.
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\ncase $2 in *platform*) echo "{says}" ;; esac\n')
    stand_in.chmod(0o755)
    bundle = tmp_path / "bundle"
    (bundle / "wheels" / "cp311-aarch64").mkdir(parents=True)
    files = cards.ROOT / "server" / "fleet" / "flash" / "files"
    (bundle / "install.sh").write_bytes((files / "install.sh").read_bytes())
    done = run("sh", str(bundle / "install.sh"), "--root", str(root), "--python", str(stand_in))
    assert done.returncode == 1
    assert words in done.stderr
    assert not root.exists()


def test_a_bundle_needs_its_wheels_once_and_says_so_off_line(alone, tmp_path):
    is_refusal(
        alone.midge(
            "bundle", "--device", "ward-3", "-o", str(tmp_path / "b"), "--wheels",
            str(tmp_path / "none"), PIP_NO_INDEX="1",
        ),
        "cannot fetch the wheels", "connect this machine to the internet for this once",
    )  # fmt: skip
    assert not (tmp_path / "b").exists()
    # No token was made: the device can still be added as if nothing had been.
    assert not alone.home.bundle("ward-3").exists()


def test_a_bundle_that_could_not_do_its_work_is_refused_or_said(alone, tmp_path):
    target = cards.target_of_this_machine()
    cards.wheels_or_skip(target)
    options = ("bundle", "--device", "ward-3", "--for", target.name)
    one, other = tmp_path / "one" / "x.npz", tmp_path / "other" / "x.npz"
    for path in (one, other):
        path.parent.mkdir()
        path.write_bytes(b"samples")
    twice = ("--with", str(one), "--with", str(other))
    is_refusal(alone.midge(*options, "-o", str(tmp_path / "b"), *twice), "two files", "x.npz")
    is_refusal(alone.midge(*options, "-o", str(tmp_path / "none" / "b")), "there is no folder")
    assert not alone.home.bundle("ward-3").exists(), "no token is made for nothing"
    done = alone.midge(*options, "-o", str(tmp_path / "b"))
    assert "'localhost', which is right on this machine alone" in done.stderr
    again = alone.midge(*options, "-o", str(tmp_path / "b"), "--broker", "192.0.2.10:8883")
    assert again.stderr == ""
    assert "made before for ward-3 enrols no more" in again.stdout


def test_wheels_with_other_hashes_are_not_used(alone, tmp_path):
    target = cards.target_of_this_machine()
    cards.wheels_or_skip(target)
    cache = tmp_path / "cache"
    (cache / target.name).mkdir(parents=True)
    for wheel in (cards.cache_folder() / target.name).glob("*.whl"):
        os.link(wheel, cache / target.name / wheel.name)
    options = ["-o", str(tmp_path / "b"), "--for", target.name, "--wheels", str(cache)]
    assert alone.midge("bundle", *options, PIP_NO_INDEX="1").returncode == 0
    wheel = next((cache / target.name).glob("click-*.whl"))
    wheel.unlink()
    wheel.write_bytes(b"PK\x03\x04 something else")
    is_refusal(alone.midge("bundle", *options, PIP_NO_INDEX="1"), "cannot fetch the wheels")


def test_the_scripts_are_clean():
    files = cards.ROOT / "server" / "fleet" / "flash" / "files"
    scripts = [str(path) for path in sorted(files.glob("*.sh"))]
    assert len(scripts) == 4
    for script in scripts:
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        cards.leave_out("shellcheck is not here: apt-get install shellcheck")
    done = run("shellcheck", "--shell=sh", *scripts)
    assert done.returncode == 0, done.stdout
