"""Data sources of a test's own: what a model could be that does what it likes.

A source may leave a thread running, and the thread shares everything with the graph that is
run behind the locked door: it stands for a model that runs its own code. What it got is
written to memory that it shares with a file since before the door was locked.
"""

import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import threading
import time

import numpy as np

REPORT_BYTES = 8192
_PR_GET_SECCOMP = 21


def samples(rows=48, seed=1):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 50, 6)).astype(np.float32)
    return x, draw.integers(0, 7, size=rows).astype(np.int32)


def greedy(megabytes):
    _ = np.ones(megabytes * 1_000_000, np.uint8)
    return samples()


def slow():
    time.sleep(600)


def environment(name):
    if name not in os.environ:
        raise ValueError(f"{name} is not set")
    return samples()


def hostile(report, identity, act=""):
    """Samples, and a thread that does `act`, or all that is refused, behind the locked door."""
    with open(report, "wb") as file:
        file.truncate(REPORT_BYTES)
    with open(report, "r+b") as file:
        shared = mmap.mmap(file.fileno(), REPORT_BYTES)
    opened = os.open(report + ".log", os.O_WRONLY | os.O_CREAT)
    threading.Thread(target=_misbehave, args=(shared, identity, opened, act), daemon=True).start()
    return samples()


def _misbehave(shared, identity, opened, act):
    libc = ctypes.CDLL(None)
    while libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) == 0:  # behind it, this too is refused
        time.sleep(0.002)
    if act:
        FATAL[act](libc)
    found = {}
    for name, attempt in _refused(libc, identity, opened).items():
        try:
            found[name] = f"done: {attempt()}"
        except (OSError, RuntimeError, ValueError, KeyError, MemoryError) as error:
            found[name] = type(error).__name__
    text = json.dumps(found).encode()
    shared[: len(text)] = text


def _refused(libc, identity, opened):
    def more_memory(limit):
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def all_memory():
        held = [b""]
        while len(held) < 10_000:
            held.append(bytearray(10_000_000))

    return {
        "read the identity": lambda: open(identity, "rb").read(),
        "write a file": lambda: open(identity + ".new", "wb"),
        "write to a file that was open": lambda: os.write(opened, b"!"),
        "remove a file": lambda: os.unlink(identity),
        "list a folder": lambda: os.listdir("/"),
        "look whether a file is there": lambda: os.stat(identity),
        "start a thread": lambda: threading.Thread(target=print).start(),
        "memory that is written and run": lambda: mmap.mmap(
            -1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7
        ),
        "memory that is shared": lambda: mmap.mmap(-1, 4096),
        "raise the limit of memory": lambda: more_memory(resource.RLIMIT_DATA),
        "start a program": lambda: subprocess.run(["/bin/true"], check=True),
        "read the environment": lambda: os.environ["MIDGE_TEST_SECRET"],
        "take all memory": all_memory,
    }


FATAL = {
    "socket": lambda _: socket.socket(),
    "unix socket": lambda _: socket.socketpair(),
    "program": lambda _: os.execv("/bin/true", ["true"]),  # noqa: S606
    "process": lambda _: os.fork(),
    "debugger": lambda libc: libc.ptrace(16, os.getppid(), 0, 0),
    "memory of the agent": lambda libc: libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0),
    "signal to the agent": lambda _: os.kill(os.getppid(), signal.SIGTERM),
    "file in memory": lambda _: os.memfd_create("x"),
}
