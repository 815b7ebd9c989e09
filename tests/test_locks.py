"""The locks agree with pyproject.toml and constraints.txt, and pip takes them."""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys

import pytest
from packaging.utils import canonicalize_name

from tests.locks import (
    LOCKS,
    MACHINES,
    RENEW,
    ROOT,
    Lock,
    applying,
    environment,
    pins,
    read,
    wanted,
)

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"


def named(locks):
    return pytest.mark.parametrize("lock", locks, ids=lambda lock: f"{lock.extra}-{lock.python}")


each = named(LOCKS)
each_for_this_python = named([lock for lock in LOCKS if lock.python == RUNNING])


@each
@pytest.mark.parametrize("machine", MACHINES)
def test_everything_that_pyproject_asks_for_is_locked_in_a_version_that_will_do(lock, machine):
    locked = read(lock.path)
    asked = wanted(lock.extra, environment(lock.python, machine))
    assert len(asked) >= 6
    for requirement in asked:
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


@each
@pytest.mark.parametrize("machine", MACHINES)
def test_every_version_is_the_one_of_the_constraints_or_a_named_exception(lock, machine):
    versions = pins(lock, environment(lock.python, machine))
    locked = {name: version for name, (version, _) in read(lock.path).items()}
    assert locked == {name: versions[name] for name in locked}


@each_for_this_python
def test_what_a_package_needs_in_turn_is_locked_too(lock):
    """For the Python that runs here: what is installed says what it needs."""
    locked, where = read(lock.path), environment(lock.python, platform.machine())
    for name in locked:
        for requirement in applying(importlib.metadata.requires(name) or (), where):
            assert canonicalize_name(requirement.name) in locked, f"{name} needs {requirement}"


@each
def test_each_package_has_the_hash_of_one_wheel_for_each_machine_and_nothing_names_an_index(lock):
    text = lock.path.read_text()
    for name, (_, hashes) in read(lock.path).items():
        assert 1 <= len(hashes) <= len(MACHINES), name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in hashes), name
    assert "://" not in text
    assert not re.search(r"(?m)^-", text)  # an option of pip


@each
def test_a_lock_says_what_it_is_for_and_how_to_renew_it(lock):
    assert lock.path.read_text().startswith(lock.why + RENEW)


def test_a_lock_that_fell_behind_would_be_noticed(tmp_path):
    lock = LOCKS[0]
    old = tmp_path / "old.txt"
    old.write_text(re.sub(r"(?m)^click==\S+", "click==8.0.0", lock.path.read_text()))
    behind = Lock(old, lock.extra, lock.python, lock.why)
    with pytest.raises(AssertionError):
        test_every_version_is_the_one_of_the_constraints_or_a_named_exception(behind, "x86_64")
    with pytest.raises(AssertionError):
        test_everything_that_pyproject_asks_for_is_locked_in_a_version_that_will_do(
            behind, "x86_64"
        )


@pytest.mark.campaign
@each_for_this_python
def test_pip_installs_exactly_what_is_locked(lock, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--require-hashes", "--only-binary", ":all:", "--dry-run", "--ignore-installed",
               "--target", str(tmp_path / "nowhere"), "-r"]  # fmt: skip
    subprocess.run([*command, str(lock.path)], check=True, timeout=600)
    forged = tmp_path / "forged.txt"
    forged.write_text(re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", lock.path.read_text()))
    done = subprocess.run([*command, str(forged)], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.campaign
def test_the_bill_of_materials_lists_exactly_what_is_locked():
    python = f"PYTHON={sys.executable}"
    subprocess.run(["make", "--no-print-directory", "sbom", python], check=True, cwd=ROOT)
    for lock in (lock for lock in LOCKS if lock.python == RUNNING):
        name = f"midge-{lock.extra}-py{RUNNING.replace('.', '')}.cdx.json"
        bill = json.loads((ROOT / "dist" / name).read_text())
        assert bill["bomFormat"] == "CycloneDX"
        assert bill["metadata"]["component"]["name"] == "midge"
        listed = {canonicalize_name(c["name"]): c["version"] for c in bill["components"]}
        assert listed == {name: version for name, (version, _) in read(lock.path).items()}
        assert all(c["purl"] and c["licenses"] for c in bill["components"])
        assert {d["ref"] for d in bill["dependencies"]} >= {
            c["bom-ref"] for c in bill["components"]
        }
