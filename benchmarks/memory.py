"""What a process holds, as Linux counts it."""

import contextlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Held", "Peak", "held", "processor_seconds", "rss_peak_bytes", "tree"]


@dataclass(frozen=True)
class Held:
    """Bytes. `pss`: pages shared with other processes count by their share."""

    pss: int
    rss: int
    private: int

    def __add__(self, other: "Held") -> "Held":
        return Held(self.pss + other.pss, self.rss + other.rss, self.private + other.private)


def held(pid: int) -> Held:
    """What a process holds now. Raises OSError when it is gone."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return Held(found["Pss"], found["Rss"], found["Private_Clean"] + found["Private_Dirty"])


def rss_peak_bytes(pid: int) -> int:
    """The most that was ever resident, by the kernel's own account."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} has no memory")


def tree(pid: int) -> list[int]:
    """A process and everything below it, whichever of its threads started that."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for each in found for child in _text(each).split()]
    return [pid, *(each for child in children for each in tree(child))]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # the thread has just ended


def processor_seconds(pids: Iterable[int]) -> float:
    """Time on a processor since each of these processes began, to the nanosecond."""
    threads = (thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((each / "schedstat").read_text().split()[0]) for each in threads) / 1e9


class Peak:
    """Watches a process and those below it for their largest PSS, every 10 ms. A context manager.

    `pss_bytes`: the most that all held at one moment; `child_rss_bytes`: the most that any
    below it ever had resident, by the kernel's own account.
    """

    def __init__(self, pid: int) -> None:
        self.pss_bytes = 0
        self.child_rss_bytes = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            together = 0
            for pid in tree(self._pid):
                with contextlib.suppress(OSError):  # it has just ended
                    together += held(pid).pss
                    if pid != self._pid:
                        self.child_rss_bytes = max(self.child_rss_bytes, rss_peak_bytes(pid))
            self.pss_bytes = max(self.pss_bytes, together)
