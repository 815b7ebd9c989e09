"""A Raspberry Pi's Python on this machine: Debian's interpreter, a device's packages, this source.

`arm64` runs under qemu-user, which translates instructions and passes system calls to this kernel;
it finds a file in the other Debian's folder first, and here otherwise. `amd64` runs as it is, with
the other Debian's C library. What is not shown: the speed of a Pi, its memory, its kernel.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from server.tasks.checks import installed_runtimes
from tests.pi.debian import CannotFetchError, fetch_root, run
from tests.pi.wheels import ROOT, fetch_site

__all__ = [
    "BOOKWORM",
    "ROOT",
    "TRIXIE",
    "TRIXIE_HERE",
    "Kind",
    "Machine",
    "here",
    "local_python",
    "prepare",
]

# ai-edge-litert 2.3.0 ends with a segmentation fault under qemu-user 7.2, and under it only.
LITERT_FOR_QEMU = "ai-edge-litert==2.1.6"
# Keep bytecode: to compile NumPy anew takes qemu ten seconds and more.
COMPILING = ("env", "-u", "PYTHONDONTWRITEBYTECODE")
QEMUS = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True)
class Kind:
    """Which Debian, whose Python and runtime, on which processor."""

    suite: str
    python: str
    runtime: str
    architecture: str = "arm64"
    instead: tuple[str, ...] = ()


BOOKWORM = Kind("bookworm", "3.11", "tflite-runtime")
TRIXIE = Kind("trixie", "3.13", "ai-edge-litert", instead=(LITERT_FOR_QEMU,))
TRIXIE_HERE = Kind("trixie", "3.13", "ai-edge-litert", architecture="amd64")


@dataclass(frozen=True)
class Machine:
    """How to run Python there. `root` is its Debian, if it has one of its own."""

    name: str
    runtime: str
    python: tuple[str, ...]
    root: Path | None = None

    def run(self, *arguments: str, give_up_s: float = 600) -> "subprocess.CompletedProcess[str]":
        """Run its Python with `arguments`, in the root of this source."""
        return subprocess.run(
            [*self.python, *arguments], capture_output=True, text=True, timeout=give_up_s,
            check=False, cwd=ROOT, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def prepare(kind: Kind, *, packages: tuple[str, ...] = ()) -> Machine:
    """Fetch what is missing, once, and say how to run it. Raises CannotFetchError.

    `packages` are Debian's, beyond Python and what compiled wheels need.
    """
    machine = {"arm64": "aarch64", "amd64": "x86_64"}[kind.architecture]
    _expect_host(machine)
    root = fetch_root(
        kind.suite, kind.architecture, (f"python{kind.python}", "libstdc++6", *packages)
    )
    site = fetch_site(kind.python, machine, *kind.instead)
    program = str(root / "usr" / "bin" / f"python{kind.python}")
    path = f"PYTHONPATH={site}:{ROOT}"
    if machine == "aarch64":
        python = (*COMPILING, _qemu(), "-L", str(root), "-E", path, program, "-S")
    else:
        loader = str(root / "lib64" / "ld-linux-x86-64.so.2")
        libraries = str(root / "usr" / "lib" / "x86_64-linux-gnu")
        home = f"PYTHONHOME={root}/usr"
        python = (*COMPILING, path, home, loader, "--library-path", libraries, program, "-S")
    name = f"Debian {kind.suite}, {machine}, Python {kind.python}, {kind.runtime}"
    return Machine(name, kind.runtime, python, root)


def here() -> Machine:
    """The Python that runs the tests, with the runtime it would take on a device."""
    runtime = installed_runtimes()[0]
    return Machine(f"here, {runtime}", runtime, (sys.executable,))


def local_python() -> Machine | None:
    """A Python of this machine that is new enough for LiteRT alone, with a device's packages."""
    for version in ("3.13", "3.12"):
        program = shutil.which(f"python{version}")
        says = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if program is None or _said(says) != version:
            continue  # a version manager leaves commands that only complain
        site = fetch_site(version, os.uname().machine)
        python = (*COMPILING, f"PYTHONPATH={site}:{ROOT}", program, "-S")
        return Machine(f"Python {version}, ai-edge-litert", "ai-edge-litert", python)
    return None


def _said(command: list[str | None]) -> str:
    words = [each for each in command if each is not None]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _qemu() -> str:
    for each in QEMUS:
        found = shutil.which(each)
        if found is not None:
            return found
    raise CannotFetchError("there is no qemu-user here: apt-get install qemu-user-static")


def _expect_host(machine: str) -> None:
    host = run("uname", "-sm").split()
    if host[0] != "Linux" or (machine != "aarch64" and host[1] != machine):
        raise CannotFetchError(f"{machine} cannot be run on {' '.join(host)}")
