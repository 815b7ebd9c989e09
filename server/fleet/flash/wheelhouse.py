"""The wheels of a target: fetched once, kept, and never used before their hash was checked.

`fetch` promises exactly the files that the target's lock file names. Once they are in the
cache it needs no network. midge's own wheel is made here from what is installed: the two
rooms that a device has, without the server and without TensorFlow.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError
from server.fleet.flash.targets import Pinned, Target

__all__ = ["cache_folder", "fetch", "own_wheel"]

_ROOMS = ("broker_bridge", "device_client")
_GLIBC_MINORS = (17, 24, 26, 27, 28, 31, 34)  # pip wants each tag that a wheel may carry
_FETCH_S = 600.0
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same source makes the same bytes


def cache_folder() -> Path:
    """Where wheels are kept unless told otherwise: midge's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "midge" / "wheels"


def fetch(target: Target, cache: Path) -> dict[str, bytes]:
    """Return the target's wheels by file name, from `cache` or else from the package index.

    Raises LocalError when they are neither here nor to be had.
    """
    folder = cache / target.name
    found = _cached(target, folder)
    if found is None:
        with _alone(folder):
            if _cached(target, folder) is None:  # another process may have been faster
                _download(target, folder)
        found = _cached(target, folder)
    if found is None:
        raise LocalError(
            f"the wheels for {target.name} came with other hashes than {target.lock} has; "
            "trust none of them, and see which package index pip uses"
        )
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time fetches into a folder; another waits until it is done."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _cached(target: Target, folder: Path) -> dict[str, bytes] | None:
    """All of the target's wheels, or None if one is missing or is not what it should be."""
    if not folder.is_dir():
        return None
    found = {}
    for pinned in target.pinned():
        wheel = _one(pinned, folder)
        if wheel is None:
            return None
        found[wheel[0]] = wheel[1]
    return found


def _one(pinned: Pinned, folder: Path) -> tuple[str, bytes] | None:
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        if (_normal(name), version) != (_normal(pinned.name), pinned.version):
            continue
        with disk_errors(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() in pinned.hashes:
            return path.name, data
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def _download(target: Target, folder: Path) -> None:
    """Have pip fetch the wheels and check their hashes, then keep them. Raises LocalError."""
    abi = f"cp{target.python.replace('.', '')}"
    tags = [f"manylinux_2_{minor}_{target.machine}" for minor in _GLIBC_MINORS]
    with tempfile.TemporaryDirectory() as temporary:
        lock = Path(temporary, "lock.txt")
        lock.write_text(target.lock_text())
        out = Path(temporary, "wheels")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--require-hashes", "--only-binary", ":all:",
            "--python-version", target.python, "--implementation", "cp",
            "--abi", abi, "--abi", "abi3", "--abi", "none",
            *(part for tag in (f"manylinux2014_{target.machine}", *tags)
              for part in ("--platform", tag)),
            "--dest", str(out), "--requirement", str(lock),
        ]  # fmt: skip
        _run_pip(command, target, folder)
        for wheel in sorted(out.glob("*.whl")):
            write_atomic(folder / wheel.name, wheel.read_bytes(), mode=0o644, durable=False)


def _run_pip(command: list[str], target: Target, folder: Path) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FETCH_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stderr.strip()
    except subprocess.TimeoutExpired:
        said = f"nothing came within {_FETCH_S:.0f} s"
    else:
        if done.returncode == 0:
            return
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or [said]
    reason = " ".join(errors[-1].removeprefix("ERROR: ").split())[:200]
    raise LocalError(
        f"cannot fetch the wheels for {target.name} ({reason}); connect this machine to the "
        f"internet for this once, or copy {folder} from one that has it and say --wheels"
    )


# ── Our own ─────────────────────────────────────────────────────────────────────────────


def own_wheel() -> tuple[str, bytes]:
    """Make midge's wheel for devices from the installed source; return its name and bytes."""
    version = importlib.metadata.version("midge")
    info = f"midge-{version}.dist-info"
    files = {
        name: path.read_bytes() for room in _ROOMS for name, path in sorted(_files(room).items())
    }
    files[f"{info}/METADATA"] = _metadata(version).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: midge\nRoot-Is-Purelib: true\n" + (
        b"Tag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = (
        b"[console_scripts]\nmidge-device = device_client.cli:main\n"
    )
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    files[f"{info}/RECORD"] = record.encode()
    return f"midge-{version}-py3-none-any.whl", _zipped(files)


def _files(room: str) -> dict[str, Path]:
    spec = importlib.util.find_spec(room)
    if spec is None or not spec.submodule_search_locations:
        raise LocalError(f"the package {room} is not installed here; install midge anew")
    base = Path(spec.submodule_search_locations[0])
    return {
        f"{room}/{path.relative_to(base).as_posix()}": path
        for path in base.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _metadata(version: str) -> str:
    needs = [line for line in importlib.metadata.requires("midge") or () if "extra ==" not in line]
    lines = ["Metadata-Version: 2.1", "Name: midge", f"Version: {version}",
             "Summary: midge, the part for devices", "Requires-Python: >=3.11",
             *(f"Requires-Dist: {need}" for need in needs)]  # fmt: skip
    return "\n".join(lines) + "\n"


def _zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return out.getvalue()
