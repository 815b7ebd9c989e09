"""For a fleet of cards: a table of what was written, and labels to print and stick on.

The label has the name and room for the fingerprint, which only the device's first boot makes:
`midge device list` has it then, and who compares the two knows that nobody is in between.
"""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Written", "as_csv", "as_labels", "from_csv"]

_COLUMNS = ("device", "image", "token_expires", "fingerprint")


@dataclass(frozen=True)
class Written:
    """One card."""

    device: str
    image: str
    token_expires: str
    fingerprint: str = ""  # filled in by a person


def as_csv(cards: Sequence[Written]) -> str:
    """A table; `fingerprint` is empty at first, to be filled in."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(_COLUMNS)
    rows.writerows([getattr(card, name) for name in _COLUMNS] for card in cards)
    return out.getvalue()


def from_csv(text: str) -> list[Written]:
    """What `as_csv` wrote, and a person may have filled in."""
    rows = csv.DictReader(io.StringIO(text))
    return [Written(**{name: row.get(name) or "" for name in _COLUMNS}) for row in rows]


def as_labels(cards: Sequence[Written], federation: str) -> str:
    """A page to print: three labels a row, 63 by 38 mm."""
    labels = "\n".join(
        f"<div><b>{html.escape(card.device)}</b><p>midge {html.escape(federation)}</p>"
        "<p>fingerprint ____-____-____-____</p></div>"
        for card in cards
    )
    return f"""<!doctype html>
<meta charset="utf-8">
<title>midge {html.escape(federation)}</title>
<style>
  body {{ display: grid; grid-template-columns: repeat(3, 63mm); gap: 2mm }}
  div {{ height: 38mm; padding: 4mm; border: 1px dashed #999; font-family: sans-serif }}
  div {{ box-sizing: border-box; break-inside: avoid }}
  b {{ font-size: 16pt }} p {{ margin: 2mm 0 0; font-size: 9pt }}
</style>
{labels}
"""
