"""What a person sees: tables, facts and lines. The only file that draws.

On a terminal rich draws; into a pipe or file everything is plain lines.
"""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from broker_bridge.wire.messages import Presence, RoundSummary

__all__ = ["ago", "brief", "facts", "human_bytes", "presence_line", "summary_line", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Print a table, or, not on a terminal, its rows as columns of plain text."""
    if sys.stdout.isatty():
        drawn = Table(title=title or None, title_justify="left", header_style="bold")
        for name in header:
            drawn.add_column(name)
        for row in rows:
            drawn.add_row(*(str(cell) for cell in row))
        Console().print(drawn)
        return
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    if title:
        print(title)
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def facts(values: Mapping[str, object], indent: int = 0) -> None:
    """Print a name and a value on each line; a mapping inside is set in."""
    for name, value in values.items():
        pad = " " * indent
        if isinstance(value, Mapping):
            if value:
                print(f"{pad}{name}")
                facts(value, indent + 2)
            continue
        print(f"{pad}{name:<{18 - indent}} {value}")


def brief(values: object) -> str:
    """`accuracy 0.812, loss 0.61`."""
    if not isinstance(values, Mapping):
        return str(values)
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def ago(at: object) -> str:
    """How long ago a moment was, for a person."""
    if not isinstance(at, int | float):
        return "never"
    seconds = max(0, int(time.time() - at))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def human_bytes(count: float) -> str:
    """`1.2 MB`, in powers of ten, as networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def summary_line(summary: RoundSummary) -> str:
    """One round in one line."""
    measured = f", {brief(summary.evaluation)}" if summary.evaluation else ""
    why = f" ({summary.reason})" if summary.reason else ""
    return (
        f"round {summary.round} {summary.state}{why}: {summary.accepted} of {summary.target} "
        f"updates, {summary.round_s:.2f} s, of it {summary.train_s_max:.2f} s training{measured}"
    )


def presence_line(device: str, presence: Presence) -> str:
    """One device in one line."""
    detail = f" ({presence.detail})" if presence.detail else ""
    return f"device {device} {presence.state}{detail}"
