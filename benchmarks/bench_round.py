"""Round time beyond training: midge and Flower, 4 devices, 100,000 float32 parameters.

Both on this machine, in one run, every process real. A round's time is the time between
two means becoming known: for midge from one summary on `metrics` to the next, less the
longest local training; for Flower from one `aggregate_train` to the next, with a client
that does not train. First rounds, in which tasks are fetched and nodes found, are left out.

midge runs as shipped: mutual TLS, ACL, updates sealed, signed and on disk before they count.
Flower runs with TLS, then without. No evaluation on either side.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fleet import DENSE100K, Fleet, one_sample
from benchmarks.flower import Flower, FlowerMissingError, install
from benchmarks.machine import Spread, header, is_quick, seconds, table

DEVICES = 4
TARGET = 50.0


def midge(rounds: int) -> tuple[list[float], list[float], float]:
    """Return round times beyond training, training times, and CPU seconds a round."""
    with Fleet(DENSE100K) as fleet:
        data = one_sample(fleet.folder)
        names = [f"device-{number}" for number in range(DEVICES)]
        devices = [fleet.run_device(name, "--data", data) for name in names]
        pids = [process.pid for process in (fleet.broker, fleet.server, *devices)]
        fleet.rounds(1, task="dense100k")
        before = cpu_seconds(pids)
        closed = fleet.rounds(rounds + 1, task="dense100k")
        used = (cpu_seconds(pids) - before) / (rounds + 1)
    beyond = [
        after.heard_s - before.heard_s - after.summary.train_s_max
        for before, after in itertools.pairwise(closed)
    ]
    return beyond, [c.summary.train_s_max for c in closed[1:]], used


def flower(rounds: int, *, encrypted: bool) -> Spread:
    """Return times between rounds."""
    with Flower(nodes=DEVICES, encrypted=encrypted) as running:
        times = running.rounds(rounds + 1)
    return Spread.of([after - before for before, after in itertools.pairwise(times)])


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of processes and of their children."""
    ticks = 0
    for pid in [*pids, *itertools.chain.from_iterable(map(_children, pids))]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    """The processes that `pid` started: mosquitto, for one."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main() -> None:
    """Print the table."""
    header(f"Round time beyond training, {DEVICES} devices, 100,000 parameters (400 kB float32)")
    rounds = 5 if is_quick() else 20
    found = [midge(rounds)]
    theirs: dict[str, Spread] = {}
    try:
        version = install()
        for encrypted in (True, False):
            name = f"Flower {version}, {'TLS' if encrypted else 'plain'}"
            theirs[name] = flower(2 if is_quick() else 6, encrypted=encrypted)
    except FlowerMissingError as error:
        print(f"  Flower skipped: {error}\n")
    # Half before and half after, so that a busy minute does not fall on one side alone.
    found.append(midge(rounds))
    ours, training = (Spread.of([*found[0][i], *found[1][i]]) for i in (0, 1))
    used = sum(used for _, _, used in found) / len(found)
    rows = [
        ["midge, mutual TLS + ACL + sealed", seconds(ours), "1"],
        ["  its local training, subtracted", seconds(training), ""],
    ]
    for name, times in theirs.items():
        rows.append([name, seconds(times), f"{times.median / ours.median:.0f}"])
    table(["", "median (p10 … p90)", "times midge"], rows)
    print(f"  midge used {used * 1000:.0f} ms of processor time a round, all processes together")
    print(f"  target: Flower with TLS ≥ {TARGET:.0f} times midge\n")


if __name__ == "__main__":
    main()
