"""Everything that a device gets, as one folder of files; the same on a card and in a bundle.

    install.sh uninstall.sh         they say themselves what they do
    wheels/cp311-aarch64/           the software
    midge-device.service            the unit
    made-at                         seconds since 1970: no clock on a device may be behind this
    device.toml                     settings, unless the device has its own
    device.bundle                   the one-time token: the only secret among these
    tasks/ data/                    a task and samples, if they were asked for
    SHA256SUMS                      of all of them; install.sh uses nothing that differs

What the sums do not do: whoever can change a file can change them too. They find damage.
"""

import hashlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from broker_bridge.disk import disk_errors
from broker_bridge.errors import LocalError, PeerError
from broker_bridge.task.taskfile import decode_task, encode_plan
from server.fleet.flash.targets import Target
from server.fleet.flash.wheelhouse import fetch, own_wheel

__all__ = [
    "DATA_FOLDER",
    "UNIT",
    "cached_tasks",
    "file_of_ours",
    "own_files",
    "parcel",
    "settings_text",
    "tarball",
    "unit_text",
]

DATA_FOLDER = "/var/lib/midge/data"
UNIT = "midge-device.service"


def parcel(
    targets: Sequence[Target],
    cache: Path,
    *,
    made_at: int,
    settings: str,
    bundle: bytes | None,
    extra: Mapping[str, bytes] | None = None,
) -> dict[str, bytes]:
    """Return the files by name. `bundle`: None makes one that upgrades and enrols nobody.

    Raises LocalError when the wheels are not to be had.
    """
    name, wheel = own_wheel()
    files = {each: file_of_ours(each) for each in ("install.sh", "uninstall.sh")}
    files[UNIT] = unit_text()
    files["made-at"] = f"{made_at}\n".encode()
    files["device.toml"] = settings.encode()
    for target in targets:
        for wheel_name, data in fetch(target, cache).items():
            files[f"wheels/{target.tag}/{wheel_name}"] = data
        files[f"wheels/{target.tag}/{name}"] = wheel
    if bundle is not None:
        files["device.bundle"] = bundle
    files |= extra or {}
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    files["SHA256SUMS"] = "".join(sorted(lines)).encode()
    return files


def file_of_ours(name: str) -> bytes:
    """A file of `files/`."""
    return resources.files(__package__).joinpath("files", name).read_bytes()


def unit_text() -> bytes:
    """The device's unit, as the device's package has it."""
    # Read as a file, not imported: this room knows nothing of that one.
    spec = importlib.util.find_spec("device_client")
    if spec is None or not spec.submodule_search_locations:
        raise LocalError("the package device_client is not installed here; install midge anew")
    path = Path(spec.submodule_search_locations[0], UNIT)
    with disk_errors(path):
        return path.read_bytes()


def settings_text(*, data: str, role: str) -> str:
    """The first device.toml of a device."""
    lines = ["# The settings of this device; `midge-device run --help` says more."]
    if data:
        lines.append(f"data = {json.dumps(data, ensure_ascii=False)}")
    else:
        lines.append('# data = "npz:/var/lib/midge/data/samples.npz"   where its samples are')
    lines.append(f"role = {json.dumps(role)}")
    return "\n".join(lines) + "\n"


def own_files(paths: Sequence[Path]) -> dict[str, bytes]:
    """Files of the operator's own, for the folder data/. Raises LocalError."""
    found = {}
    for path in paths:
        if f"data/{path.name}" in found:
            raise LocalError(f"two files are called {path.name}; on the device they would be one")
        with disk_errors(path):
            found[f"data/{path.name}"] = path.read_bytes()
    return found


def cached_tasks(paths: Sequence[Path]) -> dict[str, bytes]:
    """The tasks of these files without their weights, named as a device keeps them.

    A device that has its task fetches only the model in its first round. Raises LocalError.
    """
    found = {}
    for path in paths:
        with disk_errors(path):
            content = path.read_bytes()
        try:
            plan, _ = decode_task(content)
        except PeerError as error:
            raise LocalError(f"{path}: {error}") from None
        data = encode_plan(plan.task, plan.tflite)
        if hashlib.sha256(data).digest() != plan.digest:
            raise LocalError(f"{path} was written by another version of midge; build it again")
        found[f"tasks/{plan.digest.hex()[:16]}.plan"] = data
    return found


def tarball(files: Mapping[str, bytes], folder: str) -> bytes:
    """Pack `files` into one .tar.gz in which all of them are in `folder`."""
    out = io.BytesIO()
    # Level 1: the wheels, nearly all of it, are compressed already.
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(data)
            entry.mode = 0o755 if name.endswith(".sh") else 0o644
            if name == "device.bundle" or name.startswith("data/"):
                entry.mode = 0o600
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()
