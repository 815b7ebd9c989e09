"""What a person sees: tables, facts and lines. The only file that draws.

On a terminal rich draws; into a pipe or file everything is plain lines.
"""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from broker_bridge.wire.messages import Presence, RoundSummary

__all__ = [
    "Progress",
    "ago",
    "brief",
    "facts",
    "human_bytes",
    "presence_line",
    "progress",
    "summary_line",
    "table",
]


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Print a table, or, not on a terminal, its rows as columns of plain text.

    Column names that are all empty are left out.
    """
    named = any(header)
    if sys.stdout.isatty():
        drawn = Table(title=title or None, title_justify="left", show_header=named)
        for name in header:
            drawn.add_column(name)
        for row in rows:
            drawn.add_row(*(str(cell) for cell in row))
        Console().print(drawn)
        return
    lines = [[str(cell) for cell in row] for row in ([header, *rows] if named else rows)]
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
    # A device wrote it: nothing in it may move the cursor.
    printable = "".join(c if c.isprintable() else " " for c in presence.detail)
    detail = f" ({printable})" if printable else ""
    return f"device {device} {presence.state}{detail}"


class Progress:
    """A run as it goes on: one line that changes on a terminal, plain lines elsewhere."""

    def __init__(self, *, plain: bool, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=quiet)
        self._live = None if plain or not sys.stdout.isatty() else Live(console=self._console)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr if self._quiet else sys.stdout, flush=True)

    def show(
        self,
        *,
        round_number: int,
        rounds: int,
        joined: int,
        training: int,
        uploaded: int,
        accuracy: float | None,
        sent_bytes: int,
    ) -> None:
        """What is happening now; shown on a terminal only."""
        if self._live is None:
            return
        row = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        done = min(round_number, rounds)
        row.add_row(
            f"[bold]round {done}[/] of at most {rounds}",
            f"joined {joined}",
            f"training {training}",
            f"uploaded {uploaded}",
            f"accuracy {'-' if accuracy is None else format(accuracy, '.3f')}",
            human_bytes(sent_bytes),
        )
        self._live.update(row)


def progress(*, plain: bool, quiet: bool) -> Progress:
    """Something to show a run with. `quiet`: on standard error, for output that scripts read."""
    return Progress(plain=plain, quiet=quiet)
