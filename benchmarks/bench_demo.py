"""`midge demo`, what `make demo` runs once everything is installed: time and CPU by phase.

The seconds are the demo's own (`--json`). Processor time is that of the demo and of all
processes it starts, looked at every 50 ms and divided at the ends of the phases.
"""

import bisect
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.machine import Spread, header, is_quick, table
from benchmarks.memory import tree

TARGET_S = 180.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Cost = tuple[float, float]  # seconds, processor seconds


class Clock:
    """Processor time of a process and all it started, over time."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._times: list[float] = []
        self._used: list[float] = []
        self._ended: dict[int, float] = {}

    def watch(self, done: threading.Event) -> None:
        """Look until `done`."""
        while not done.wait(0.05):
            for pid in _alive(self._pid):
                self._ended[pid] = max(self._ended.get(pid, 0.0), _cpu_seconds(pid))
            self._times.append(time.monotonic())
            self._used.append(sum(self._ended.values()))

    def at(self, when_s: float) -> float:
        """Processor seconds until then."""
        place = bisect.bisect_right(self._times, when_s)
        return self._used[place - 1] if place else 0.0


def _alive(pid: int) -> list[int]:
    try:
        return tree(pid)
    except OSError:
        return []  # one of them ended while we looked: the next look will do


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / _TICKS_PER_S


def demo() -> tuple[dict[str, Cost], dict[str, object]]:
    """Run it once; return the cost of each phase, and what it printed."""
    started_s = time.monotonic()
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("midge")), "demo", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    clock, done = Clock(process.pid), threading.Event()
    watcher = threading.Thread(target=clock.watch, args=[done])
    watcher.start()
    assert process.stderr is not None
    said = [process.stderr.readline()]
    made_keys_s = time.monotonic()  # its first line ends its first phase
    out, rest = process.communicate()
    ended_s = time.monotonic()
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError("".join([*said, rest]))
    result = json.loads(out)
    (first, first_s), *others = result["phases_s"].items()
    ends = {"start of Python": made_keys_s - first_s, first: made_keys_s}
    for name, lasted_s in others:
        ends[name] = max(ends.values()) + lasted_s
    ends["stopping twelve processes"] = max(ended_s, *ends.values())
    return _between(started_s, ends, clock), result


def _between(start_s: float, ends: dict[str, float], clock: Clock) -> dict[str, Cost]:
    costs = {}
    for name, end_s in ends.items():
        costs[name] = (end_s - start_s, clock.at(end_s) - clock.at(start_s))
        start_s = end_s
    return costs


def main() -> None:
    """Print the table."""
    header("midge demo by phase: ten people's wearables, ten device processes")
    runs = [demo() for _ in range(1 if is_quick() else 3)]
    costs = [found for found, _ in runs]
    rows = [[name, *_spreads([each[name] for each in costs])] for name in costs[0]]
    totals = [tuple(map(sum, zip(*each.values(), strict=True))) for each in costs]
    table(["", "seconds", "processor seconds"], [*rows, ["together", *_spreads(totals)]])
    last = runs[-1][1]
    print(f"  {last['rounds']} rounds, accuracy {last['accuracy']['federated']:.3f}")  # type: ignore[index]
    print(f"  target: ≤ {TARGET_S:.0f} s\n", flush=True)


def _spreads(costs: list[Cost]) -> list[str]:
    return [Spread.of([cost[i] for cost in costs]).text(digits=2) for i in (0, 1)]


if __name__ == "__main__":
    main()
