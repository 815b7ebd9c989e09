"""What this machine says of itself and of this process: for figures that people read."""

import platform
import resource
import sys
from pathlib import Path

__all__ = ["machine_name", "peak_memory_bytes"]


def machine_name() -> str:
    """The kind of processor, such as `aarch64` or `x86_64`; empty if it is not known."""
    return platform.machine()[:40]


def peak_memory_bytes(pid: int | None = None) -> int:
    """The most memory (RSS) that this process, or process `pid`, ever held, in bytes.

    Linux knows it of the program as it was started. `getrusage`, which other systems have, also
    counts the process that started it, before `exec` (getrusage(2), "ru_maxrss"). 0: not known
    (of another process, or in a sandbox, where nothing can be read).
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text("ascii", "replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if pid is not None or sys.platform == "linux":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
