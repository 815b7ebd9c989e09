"""Memory of one device: idle, training, after training; what its libraries cost; Flower's.

A real `midge-device run`, enrolled, against a real broker and server, with person 1's
wearables, then with device 1's digits. Agent and training process are counted together, and
after the rounds once more without the training process. PSS is what Linux says a process
costs this machine: pages that it shares with others count by their share. RSS counts them
whole, and is what it would cost alone: two RSS count what the two share twice.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fleet import Fleet
from benchmarks.flower import Flower, FlowerMissingError, install
from benchmarks.machine import Spread, header, is_quick, megabytes, table
from benchmarks.memory import Held, Peak, held, processor_seconds, rss_peak_bytes, tree

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCES = {"wearables": "person?id=1", "digits": "device?id=1"}
DAY_S = 86_400
IDLE_TARGET_BYTES = 50_000_000
PEAK_TARGET_BYTES = 70_000_000
AGENT_TARGET_BYTES = 64_000_000

# Each line on top of those before it, in one fresh interpreter.
STEPS = (
    ("Python alone", "pass"),
    ("+ numpy", "import numpy"),
    ("+ TensorFlow Lite", "from broker_bridge.task.runtime import _load_module as m; m(None)"),
    ("+ msgspec", "import msgspec, msgspec.json, msgspec.msgpack"),
    ("+ nacl", "import broker_bridge.wire.envelope"),
    ("+ ssl, socket, paho", "import broker_bridge.link.paho_link"),
    ("+ click", "import click"),
    ("+ all of midge-device", "import device_client.cli"),
)


def steps() -> list[Held]:
    """What one interpreter holds after each of STEPS."""
    lines = ["import sys; from benchmarks.memory import held; import os; pid = os.getpid()"]
    for _, code in STEPS:
        lines += [code, "h = held(pid); print(h.pss, h.rss, h.private)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return [Held(*map(int, line.split())) for line in done.stdout.splitlines()]


def settled(pids: list[int]) -> Held:
    """What processes hold together: the middle of ten looks, a second in all."""
    looks = []
    for _ in range(10):
        looks.append(sum((held(pid) for pid in pids), Held(0, 0, 0)))
        time.sleep(0.1)
    return sorted(looks, key=lambda each: each.pss)[len(looks) // 2]


def idle_processor_s(pids: list[int]) -> float:
    """Processor seconds that processes would use in a day of doing nothing."""
    lasted_s = 5.0 if is_quick() else 30.0
    before = processor_seconds(pids)
    time.sleep(lasted_s)
    return (processor_seconds(pids) - before) / lasted_s * DAY_S


def main() -> None:
    """Print three tables."""
    header("Memory and idle processor time of one device")
    repeats, rounds = (1, 2) if is_quick() else (5, 5)
    rows, used = [], []
    for task, source in SOURCES.items():
        found: dict[str, list[tuple[int, int]]] = {}
        for _ in range(repeats):
            used.append(one_device(task, source, rounds, found))
        rows += [
            [f"{task}: {what}", mb([pss for pss, _ in values]), mb([rss for _, rss in values])]
            for what, values in found.items()
        ]
    notes = []
    try:
        version = install()
        theirs, processes, their_s = flower_idle()
        notes.append(f"  Flower, idle: {their_s:,.0f} processor seconds a day")
        rows.append([f"Flower {version} SuperNode, idle, {processes} processes",
                     megabytes(theirs.pss), megabytes(theirs.rss)])  # fmt: skip
    except FlowerMissingError as error:
        notes.append(f"  Flower skipped: {error}")
    table(["", "PSS", "RSS"], rows)
    print(f"  target: idle ≤ {megabytes(IDLE_TARGET_BYTES)} PSS; "
          f"peak of both ≤ {megabytes(PEAK_TARGET_BYTES)} PSS; "
          f"each ≤ {megabytes(AGENT_TARGET_BYTES)} RSS\n")  # fmt: skip
    table(["what is imported", "RSS then", "more"], increments())
    print(f"  midge, idle: {Spread.of(used).text()} processor seconds a day")
    print("\n".join(notes), flush=True)


def one_device(
    task: str, source: str, rounds: int, found: dict[str, list[tuple[int, int]]]
) -> float:
    """Run one device through `rounds`, add (PSS, RSS) to `found`, and return its idle time."""

    def add(what: str, pss: int, rss: int) -> None:
        found.setdefault(what, []).append((pss, rss))

    with Fleet(EXAMPLES / task / f"{task}.task") as fleet:
        device = fleet.run_device("device", "--data", f"{EXAMPLES / task / 'source.py'}:{source}")
        time.sleep(2.0)
        idle = settled([device.pid])
        add("idle, before any round", idle.pss, idle.rss)
        used = idle_processor_s([device.pid])
        with Peak(device.pid) as peak:
            fleet.rounds(rounds, task=task)
        agent_rss = rss_peak_bytes(device.pid)
        add("peak, both processes", peak.pss_bytes, agent_rss + peak.child_rss_bytes)
        add("  of it the agent", 0, agent_rss)
        add("  of it training", 0, peak.child_rss_bytes)
        time.sleep(2.0)
        both = settled(tree(device.pid))
        add("between rounds, both", both.pss, both.rss)
        for pid in tree(device.pid)[1:]:
            os.kill(pid, signal.SIGTERM)  # what it does by itself after three minutes
        time.sleep(1.0)
        after = settled([device.pid])
        add("idle, after them", after.pss, after.rss)
    return used


def mb(values: list[int]) -> str:
    if not any(values):
        return ""
    return f"{Spread.of([float(v) for v in values]).text(scale=1e-6, digits=1)} MB"


def increments() -> list[list[str]]:
    found = [step.rss for step in steps()]
    more = [b - a for a, b in zip([0, *found], found, strict=False)]
    return [[name, megabytes(rss), megabytes(extra)]
            for (name, _), rss, extra in zip(STEPS, found, more, strict=True)]  # fmt: skip


def flower_idle() -> tuple[Held, int, float]:
    """What one SuperNode and the processes it started hold, how many they are, and what they
    use of a processor in a day.
    """
    with contextlib.ExitStack() as stack:
        flower = stack.enter_context(Flower(nodes=1, encrypted=True, start_nodes=False))
        node = flower.start_node(0, flower.port)
        time.sleep(15.0)
        pids = tree(node.pid)
        return settled(pids), len(pids), idle_processor_s(pids)


if __name__ == "__main__":
    main()
