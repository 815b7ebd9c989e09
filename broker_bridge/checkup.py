"""What `midge doctor` and `midge-device doctor` have in common: looking, and saying what to do.

Each check looks at one thing of a real installation and answers with one line: ok, a
warning (it works, and will not for long, or not in every case) or a problem (it does not
work, or does not protect). A line that is not ok says what to do. Nothing is repaired, and
nothing of the fleet is changed: what is written to try a disk or a broker is removed again.

Time is passed in. What could not be looked at is said, never taken for ok.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import click

from broker_bridge.disk import disk_errors, write_atomic
from broker_bridge.errors import LocalError, MidgeError
from broker_bridge.link.local_broker import find_mosquitto
from broker_bridge.task.runtime import RUNTIMES
from broker_bridge.wire.envelope import random_bytes

__all__ = [
    "Finding",
    "Level",
    "clock",
    "disk",
    "exit_code",
    "guarded",
    "mosquitto",
    "secrets",
    "show",
    "versions",
]

Level = Literal["ok", "warning", "problem"]
_ORDER: tuple[Level, ...] = ("ok", "warning", "problem")

_FREE_PROBLEM_BYTES = 50 << 20  # less, and one model may not fit
_FREE_WARNING_BYTES = 500 << 20
_YEARS_MAX = 25  # a clock so long after the CA was made is wrong
_MOSQUITTO_LEAST = (2, 0)
_FORGETFUL = frozenset({"tmpfs", "ramfs", "overlay", "squashfs"})


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is empty only if the level is ok."""

    check: str
    level: Level
    found: str
    advice: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """0: all ok. 1: warnings only. 2: at least one problem, as for every command that fails."""
    return max((_ORDER.index(finding.level) for finding in findings), default=0)


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print the report: a line for each check, or one JSON object."""
    if as_json:
        checks = [finding.__dict__ for finding in findings]
        click.echo(json.dumps({"worst": _ORDER[exit_code(findings)], "checks": checks}))
        return
    for finding in findings:
        line = f"{finding.level:8} {finding.check:14} {finding.found}"
        click.echo(f"{line}; {finding.advice}" if finding.advice else line)


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `look` finds; an error that it meets is a finding too, never the end of the report."""
    try:
        yield from look()
    except MidgeError as error:
        found, _, advice = str(error).partition("; ")
        yield Finding(check, "problem", found, advice or "put this right, then ask again")


# ── This machine ────────────────────────────────────────────────────────────────────────


def clock(now: datetime, *, made: datetime | None) -> Iterator[Finding]:
    """Whether `now` can be. `made`: when the federation's CA began; None if not known."""
    said = f"{now:%Y-%m-%d %H:%M} UTC"
    advice = "set it: `sudo timedatectl set-ntp true`, or `sudo date -s …`, or give it an RTC"
    if made is not None and now < made:
        yield Finding(
            "clock",
            "problem",
            f"it says {said}, before this federation was made "
            f"({made:%Y-%m-%d}): no certificate is valid yet",
            advice,
        )
    elif made is not None and now.year > made.year + _YEARS_MAX:
        yield Finding(
            "clock",
            "problem",
            f"it says {said}, {now.year - made.year} years after "
            "this federation was made: no certificate is valid any more",
            advice,
        )
    else:
        yield from _synchronised(said)


def _synchronised(said: str) -> Iterator[Finding]:
    answer = _output(["timedatectl", "show", "-p", "NTPSynchronized", "--value"])
    if answer == "yes":
        yield Finding("clock", "ok", f"{said}, kept by NTP")
    elif answer == "no":
        yield Finding(
            "clock",
            "warning",
            f"{said}, not synchronised",
            "switch NTP on: `sudo timedatectl set-ntp true`",
        )
    else:
        yield Finding("clock", "ok", f"{said}; whether NTP keeps it cannot be seen here")


def disk(folder: Path) -> Iterator[Finding]:
    """Whether `folder` takes files, keeps them, and has room."""
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    scratch = folder / f".doctor-{random_bytes(4).hex()}"
    try:
        write_atomic(scratch, b"written by midge's doctor, which removes it again\n")
    except LocalError as error:
        found, _, advice = str(error).partition("; ")
        yield Finding("disk", "problem", found, advice)
        return
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    room = f"{free / (1 << 30):.1f} GiB free"
    kind = _file_system(folder)
    if kind in _FORGETFUL:
        yield Finding(
            "disk",
            "warning",
            f"{folder} is on {kind}, which a restart may empty",
            "move it to a real disk: what was promised must survive",
        )
    if free < _FREE_WARNING_BYTES:
        level: Level = "problem" if free < _FREE_PROBLEM_BYTES else "warning"
        yield Finding("disk", level, f"{folder}: only {free >> 20} MiB free", "make room there")
    elif kind not in _FORGETFUL:
        yield Finding("disk", "ok", f"{folder}: written and synced, {room}")


def _file_system(folder: Path) -> str:
    """The type of file system that `folder` is on; empty where that cannot be seen."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        place = folder.resolve()
    except OSError:
        return ""
    on = [(len(m[1]), m[2]) for m in mounts if place.is_relative_to(m[1].replace("\\040", " "))]
    return max(on)[1] if on else ""


def secrets(paths: Iterable[Path]) -> Iterator[Finding]:
    """Whether nobody but their owner can read these files."""
    count = 0
    open_ones: list[Path] = []
    for path in paths:
        with disk_errors(path):
            if not path.exists():
                continue
            count += 1
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                open_ones.append(path)
    for path in open_ones:
        yield Finding(
            "secrets",
            "problem",
            f"others on this machine may read {path}",
            f"`chmod 600 {path}`, and think about who could",
        )
    if not open_ones:
        yield Finding("secrets", "ok", f"{count} files, read by their owner alone")


def versions(*, runtime_needed: bool) -> Iterator[Finding]:
    """What is installed, and whether it is enough."""
    found = [
        f"midge {importlib.metadata.version('midge')}",
        f"Python {platform.python_version()}",
        f"numpy {importlib.metadata.version('numpy')}",
    ]
    runtimes = [f"{name} {each}" for name in RUNTIMES if (each := _version(name))]
    yield Finding("versions", "ok", ", ".join([*found, *runtimes]))
    if not runtimes:
        yield Finding(
            "versions",
            "problem" if runtime_needed else "warning",
            "no TensorFlow Lite runtime is installed: no task can be loaded",
            "pip install 'midge[device]'",
        )
    if sys.maxsize < 1 << 32:
        yield Finding(
            "versions",
            "warning",
            f"this is a 32-bit Python ({platform.machine()})",
            "install a 64-bit system: midge was tried on no other",
        )


def mosquitto() -> Iterator[Finding]:
    """The mosquitto of this machine, if it has one."""
    program = find_mosquitto()
    if program is None:
        yield Finding("mosquitto", "ok", "none on this machine")
        return
    found = re.search(r"mosquitto version (\d+)\.(\d+)\S*", _output([str(program), "-h"]))
    if found is None:
        yield Finding(
            "mosquitto",
            "warning",
            f"{program} does not say its version",
            "check that it is 2.0 or newer",
        )
    elif (int(found[1]), int(found[2])) < _MOSQUITTO_LEAST:
        yield Finding("mosquitto", "problem", found[0], "install 2.0 or newer")
    else:
        yield Finding("mosquitto", "ok", found[0])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(command: list[str]) -> str:
    """What a command says, or nothing if it cannot."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
