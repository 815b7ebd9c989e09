"""What federating brings, and whether the broker could read any of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from broker_bridge.errors import LocalError
from broker_bridge.task.taskfile import decode_task
from server.demo.stage import HELD_OUT, TRAINING, examples
from server.fleet.home import Home

__all__ = ["baselines", "readable"]

_WINDOW_BYTES = 32  # how much plaintext in a row would count as readable


def baselines(task_path: Path, *, epochs: int) -> tuple[list[float], float]:
    """The accuracy on held-out people of each person alone, and of all pooled in one place."""
    alone = [f"person?id={person}" for person in TRAINING]
    pooled = f"people?ids={','.join(str(p) for p in TRAINING)}"
    found = _accuracies(task_path, [pooled, *alone], epochs)  # the longest first
    return [found[job] for job in alone], found[pooled]


def _accuracies(task_path: Path, jobs: list[str], epochs: int) -> dict[str, float]:
    """Of each job; as many at a time as there are processors."""
    source = f"{examples()}/source.py"
    test = f"{source}:people?ids={','.join(str(p) for p in HELD_OUT)}"
    at_once = max(1, os.cpu_count() or 1)
    waiting = list(jobs)
    running: list[tuple[str, subprocess.Popen[str]]] = []
    found: dict[str, float] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            running.append((job, _try(task_path, f"{source}:{job}", test, epochs)))
        job, process = running.pop(0)
        out, err = process.communicate()
        if process.returncode:
            raise LocalError(f"a comparison failed: {err.strip()}")
        found[job] = float(json.loads(out)["test"]["accuracy"])
    return found


def _try(task_path: Path, data: str, test: str, epochs: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "device_client.cli", "try", str(task_path), "--data", data,
        "--test", test, "--epochs", str(epochs), "--json",
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=examples().parents[1],
    )  # fmt: skip


def readable(home: Home, task_path: Path, sealed: list[bytes]) -> int:
    """How many samples of the task, the models and so the updates the broker could have read.

    Looks for windows of the plaintext in everything that went through the broker.
    """
    haystack = b"".join(sealed)
    plan, _ = decode_task(task_path.read_bytes())
    plaintexts = [plan.tflite]
    plaintexts += [p.read_bytes() for p in sorted((home.state / "models").glob("*.weights"))]
    found = 0
    for plain in plaintexts:
        step = max(_WINDOW_BYTES, len(plain) // 8)
        for start in range(0, len(plain) - _WINDOW_BYTES, step):
            window = plain[start : start + _WINDOW_BYTES]
            found += any(window) and window in haystack
    return found
