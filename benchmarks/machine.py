"""What every benchmark prints beside its figures: the machine, the command, the spread."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Spread", "header", "is_quick", "machine", "megabytes", "seconds", "table"]

MIB = 1 << 20


def machine() -> str:
    """Name this machine by what its figures depend on, and by nothing else."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{_cpu()}, {os.cpu_count()} cores, {memory_bytes / (1 << 30):.0f} GiB; "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def header(title: str) -> None:
    """Print what is measured, where, and with which command."""
    name = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    busy = os.getloadavg()[0]
    print(f"{title}\n  machine  {machine()}\n  command  {command}")
    print(f"  load     {busy:.2f} processes wanted a core in the minute before\n", flush=True)


def is_quick() -> bool:
    """Say whether fewer repeats were asked for: to try a benchmark, not to quote it."""
    return "--quick" in sys.argv[1:]


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement. Percentiles by linear interpolation."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Keep `values`, sorted. Raises ValueError when there are none."""
        if not values:
            raise ValueError("nothing was measured")
        return cls(tuple(sorted(values)))

    def at(self, share: float) -> float:
        """The value below which `share` (0 … 1) of the repeats lie."""
        place = share * (len(self.values) - 1)
        low = int(place)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (place - low) * (self.values[high] - self.values[low])

    @property
    def median(self) -> float:
        """The middle of the repeats."""
        return self.at(0.5)

    def text(self, *, scale: float = 1.0, digits: int = 0) -> str:
        """`median (p10 … p90, n=…)`, each times `scale`."""
        middle, low, high = (f"{self.at(s) * scale:,.{digits}f}" for s in (0.5, 0.1, 0.9))
        return f"{middle} ({low} … {high}, n={len(self.values)})"


def seconds(spread: Spread) -> str:
    """A spread of durations, in the unit that suits it."""
    if spread.median < 1.0:
        return f"{spread.text(scale=1000)} ms"
    return f"{spread.text(digits=2)} s"


def megabytes(size_bytes: float) -> str:
    """A size in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:,.1f} MB"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a head: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    rule = ["─" * width for width in widths]
    for row in [cells[0], rule, *cells[1:]]:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([first, *others]).rstrip())
    print(flush=True)
