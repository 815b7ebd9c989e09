"""A device's software: how large for each system, how long it takes to install and to start.

The sizes are of the wheels that `midge flash` and `midge bundle` put on a device, with midge's own;
the goals are 25 MB for Raspberry Pi OS bookworm and 35 MB for trixie. Installed and started is
the bundle for this machine, with the Python that runs this: a Pi takes longer, by how much
nobody has measured. "Ready" is from starting the process to its last import, as a service
starts it: bytecode compiled, files in the page cache.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import Spread, header, is_quick, megabytes, seconds, table
from server.fleet.flash.parcel import parcel, settings_text, tarball
from server.fleet.flash.targets import TARGETS, Target
from server.fleet.flash.wheelhouse import cache_folder

GOALS_BYTES = {"bookworm-arm64": 25e6, "trixie-arm64": 35e6}


def main() -> None:
    header("What goes on a device, and how long that takes")
    rows = []
    here = None
    for target in TARGETS:
        files = _parcel(target)
        wheels = [data for name, data in files.items() if name.endswith(".whl")]
        size = sum(map(len, wheels))
        goal = GOALS_BYTES.get(target.name)
        verdict = "" if goal is None else f"≤ {megabytes(goal)}: {'yes' if size <= goal else 'NO'}"
        rows.append([target.name, len(wheels), megabytes(size), verdict,
                     megabytes(len(tarball(files, "midge")))])  # fmt: skip
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if (target.python, target.machine) == (version, platform.machine()):
            here = target
    table(["system", "wheels", "together", "goal", "midge bundle"], rows)
    if here is None:
        print("\nthere is no bundle for this machine's Python, so none is installed")
    else:
        _install(here)


def _parcel(target: Target) -> dict[str, bytes]:
    settings = settings_text(data="", role="train")
    return parcel([target], cache_folder(), made_at=0, settings=settings, bundle=None)


def _install(target: Target) -> None:
    repeats = 1 if is_quick() else 5
    installs, again, starts, sizes = [], [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as temporary:
            bundle, root = Path(temporary, "bundle"), Path(temporary, "root")
            for name, data in _parcel(target).items():
                (bundle / name).parent.mkdir(parents=True, exist_ok=True)
                (bundle / name).write_bytes(data)
            command = ["sh", str(bundle / "install.sh"), "--root", str(root), "--python",
                       sys.executable]  # fmt: skip
            installs.append(_timed(*command))
            again.append(_timed(*command))
            agent = str(root / "usr" / "local" / "bin" / "midge-device")
            starts += [_timed(agent, "--version") for _ in range(repeats)]
            sizes.append(sum(p.stat().st_blocks * 512 for p in root.rglob("*") if p.is_file()))
    print()
    table(["on this machine", target.name],
          [["install.sh", seconds(Spread.of(installs))],
           ["the same again", seconds(Spread.of(again))],
           ["process started to ready", seconds(Spread.of(starts))],
           ["installed", megabytes(Spread.of(sizes).median)]])  # fmt: skip


def _timed(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=os.sep)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
