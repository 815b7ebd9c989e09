"""The processes that hold the devices, and what each process costs."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_bridge.errors import LocalError

__all__ = ["PACKAGES", "Swarms", "Usage", "end"]

PACKAGES = Path(__file__).resolve().parents[2]  # where `python -m` finds ours


@dataclass
class Usage:
    """What a process has cost so far."""

    cpu_s: float = 0.0
    rss_bytes: int = 0
    rss_peak_bytes: int = 0

    @classmethod
    def of(cls, pid: int) -> "Usage":
        """By the kernel's account; zeros where it keeps none."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return cls()
        ticks = int(fields[11]) + int(fields[12])
        sizes = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line
        }
        return cls(
            ticks / os.sysconf("SC_CLK_TCK"),
            int(sizes.get("VmRSS", 0)) * 1024,
            int(sizes.get("VmHWM", 0)) * 1024,
        )


@dataclass
class Swarms:
    """The processes that hold the devices, and what each said last."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    said: dict[int, dict[str, Any]] = field(default_factory=dict)

    def start(self, command: list[str], log: Path) -> None:
        """Start one more."""
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=PACKAGES,
            )  # fmt: skip
        self.processes.append(process)
        threading.Thread(target=self._listen, args=[process], daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                self.said[process.pid] = json.loads(line)

    def sum(self, what: str) -> float:
        """A number over all of them."""
        return sum(float(each.get(what, 0)) for each in list(self.said.values()))

    def counts(self, what: str) -> dict[str, int]:
        """Counts by name over all of them."""
        found: Counter[str] = Counter()
        for each in list(self.said.values()):
            found.update(each.get(what, {}))
        return dict(found)

    def hear_again(self) -> None:
        """Wait until each has spoken, once: what they said before is from before."""
        self.said.clear()
        give_up = time.monotonic() + 30.0
        while len(self.said) < len(self.processes) and time.monotonic() < give_up:
            self.check()
            time.sleep(0.05)

    def check(self) -> None:
        """Raise LocalError when one has ended by itself."""
        for process in self.processes:
            if process.poll() is not None:
                raise LocalError(f"a process with simulated devices ended: {process.args!r}")

    def stop(self) -> None:
        """End them all."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Ask it to end; after a while, make it."""
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
