"""What this machine says of itself and of this process: for figures that people read."""

import platform
import resource
import sys
from pathlib import Path

__all__ = ["machine_name", "peak_in", "peak_memory_bytes"]


def machine_name() -> str:
    """The kind of processor, such as `aarch64` or `x86_64`; empty if it is not known."""
    return platform.machine()[:40]


def peak_memory_bytes() -> int:
    """The most memory (RSS) that this process ever held, in bytes; 0: not known.

    Linux knows it of the program as it was started. `getrusage`, which other systems have, also
    counts the process that started it, before `exec` (getrusage(2), "ru_maxrss").
    """
    if sys.platform == "linux":
        try:
            return peak_in(Path("/proc/self/status").read_bytes())
        except OSError:
            return 0  # in a sandbox
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_in(status: bytes) -> int:
    """The same, from what Linux has in /proc/PID/status; 0: not in there."""
    for line in status.splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
