"""Hash-locked requirements: which file of which version, for whoever trusts no index.

    python -m tests.locks        writes them again (make lock); needs the package index

One file for each Python that a device or a server may have, with the SHA-256 of the wheel for
arm64 and of the one for x86-64. The versions are those of constraints.txt; which packages it
takes is followed from pyproject.toml through what each wheel says that it needs. pip does the
finding, with the index that it is configured for, and none is written down.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MACHINES = ("aarch64", "x86_64")
GLIBC_MINORS = {"3.11": 36, "3.13": 41}  # Debian 12 and 13, and Raspberry Pi OS


@dataclass(frozen=True)
class Lock:
    """One file, for one Python. `instead`: versions that are not those of constraints.txt."""

    path: Path
    extra: str
    python: str
    why: str
    instead: tuple[tuple[str, str], ...] = ()


DEVICE = ROOT / "server" / "fleet" / "flash" / "locks"
SERVER = ROOT / "server"
LOCKS = (
    Lock(DEVICE / "py311.txt", "device", "3.11", """\
# What a device with Python 3.11 carries, on arm64 and x86-64: Raspberry Pi OS 12 and Debian 12.
#
# `midge bundle` and `midge flash` take exactly these files; pip and the device check the hashes.
"""),
    Lock(DEVICE / "py313.txt", "device", "3.13", """\
# What a device with Python 3.13 carries, on arm64 and x86-64: Raspberry Pi OS 13 and Debian 13.
# LiteRT 2.1.6 and not 2.3.0: 1.7 MB less, and 2.3.0 does not start under qemu-user, where we
# test it.
#
# `midge bundle` and `midge flash` take exactly these files; pip and the device check the hashes.
""", (("ai-edge-litert", "2.1.6"),)),
    Lock(SERVER / "requirements-py311.txt", "server", "3.11", """\
# What a server with Python 3.11 carries, on arm64 and x86-64 (glibc 2.36 or newer).
#
#   pip install --require-hashes --only-binary :all: -r requirements-py311.txt
#   pip install --no-deps midge-*.whl
"""),
    Lock(SERVER / "requirements-py313.txt", "server", "3.13", """\
# What a server with Python 3.13 carries, on arm64 and x86-64 (glibc 2.41 or newer).
#
#   pip install --require-hashes --only-binary :all: -r requirements-py313.txt
#   pip install --no-deps midge-*.whl
"""),
)  # fmt: skip
RENEW = "# Generated: `make lock` writes this file again from pyproject.toml and constraints.txt.\n"


# ── What the project says ───────────────────────────────────────────────────────────────


def environment(python: str, machine: str) -> dict[str, str]:
    """What markers are compared with (PEP 508), on that machine."""
    return {
        "python_version": python, "python_full_version": f"{python}.0",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
        "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux",
        "platform_machine": machine, "platform_release": "", "platform_version": "",
        "implementation_version": f"{python}.0",
    }  # fmt: skip


def applying(texts: Iterable[str], where: dict[str, str], extra: str = "") -> list[Requirement]:
    """Those requirements whose markers hold."""
    found = [Requirement(text) for text in texts]
    return [r for r in found if r.marker is None or r.marker.evaluate(where | {"extra": extra})]


def wanted(extra: str, where: dict[str, str]) -> list[Requirement]:
    """What pyproject.toml asks for under this extra, midge's own extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts, extras = list(project["dependencies"]), [extra]
    while extras:
        for text in project["optional-dependencies"][extras.pop()]:
            requirement = Requirement(text)
            if requirement.name == "midge":
                extras += requirement.extras
            else:
                texts.append(text)
    return applying(texts, where)


def pins(lock: Lock, where: dict[str, str]) -> dict[str, str]:
    """The version of each package, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    texts = [line for line in lines if line and not line.startswith("#")]
    found = {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==")
        for r in applying(texts, where)
    }
    return found | dict(lock.instead)


def read(path: Path) -> dict[str, tuple[str, list[str]]]:
    """A lock file: version and hashes of each package, by canonical name."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement, *hashes = line.split()
            name, _, version = requirement.partition("==")
            found[canonicalize_name(name)] = (version, hashes)
    return found


# ── What the index has ──────────────────────────────────────────────────────────────────


def resolved(lock: Lock, machine: str) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of each wheel that this machine needs, by canonical name."""
    where = environment(lock.python, machine)
    versions = pins(lock, where)
    found: dict[str, tuple[str, str]] = {}
    asked = wanted(lock.extra, where)
    while asked:
        names = {canonicalize_name(r.name) for r in asked}
        for requirement in asked:
            version = versions[canonicalize_name(requirement.name)]
            if not requirement.specifier.contains(version):
                raise SystemExit(f"constraints.txt has {version}, but {requirement} is needed")
        new = [f"{name}=={versions[name]}" for name in sorted(names - set(found))]
        asked = []
        for item in from_index(new, lock.python, machine) if new else ():
            about = item["metadata"]
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            found[canonicalize_name(about["name"])] = (about["version"], digest)
            asked += applying(about.get("requires_dist", ()), where)
    return found


def from_index(requirements: list[str], python: str, machine: str) -> Iterator[dict[str, Any]]:
    """What pip would install of each, without what it needs in turn."""
    abi = f"cp{python.replace('.', '')}"
    platforms = [f"manylinux_2_{n}_{machine}" for n in range(17, GLIBC_MINORS[python] + 1)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:",
            "--ignore-requires-python",  # pip compares that with the Python that it runs on
            "--report", str(report), "--target", folder, "--python-version", python,
            "--implementation", "cp", "--abi", abi, "--abi", "abi3", "--abi", "none",
            *(word for p in (f"manylinux2014_{machine}", *platforms) for word in ("--platform", p)),
            *requirements,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        yield from json.loads(report.read_text())["install"]


def text_of(lock: Lock) -> str:
    """The file's contents: every package once, with the hash for each machine."""
    merged: dict[str, tuple[str, set[str]]] = {}
    for machine in MACHINES:
        for name, (version, digest) in resolved(lock, machine).items():
            merged.setdefault(name, (version, set()))[1].add(digest)
    lines = [lock.why, RENEW]
    for name, (version, digests) in sorted(merged.items()):
        hashes = (f"    --hash=sha256:{digest}" for digest in sorted(digests))
        lines.append(" \\\n".join((f"{name}=={version}", *hashes)) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    for each in LOCKS:
        each.path.write_text(text_of(each))
        print(f"{each.path.relative_to(ROOT)}: {len(read(each.path))} packages")
