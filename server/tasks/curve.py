"""A learning curve as a picture: a line of blocks for a terminal, or an SVG file."""

from collections.abc import Sequence

__all__ = ["blocks", "svg"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48


def blocks(values: Sequence[float]) -> str:
    """Return one character for each value, from the lowest to the highest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)


def svg(values: Sequence[float], *, title: str) -> str:
    """Return an SVG picture of `values`, one for each epoch, from 0 up."""
    high = max(values) or 1.0
    step = (_WIDTH - 2 * _MARGIN) / max(len(values) - 1, 1)
    points = [
        (_MARGIN + step * i, _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * value / high)
        for i, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    floor = _HEIGHT - _MARGIN
    safe = title.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        f'<text x="{_MARGIN}" y="28">{safe}</text>'
        f'<path d="M{_MARGIN} {_MARGIN}V{floor}H{_WIDTH - _MARGIN}" fill="none" stroke="#888"/>'
        f'<text x="8" y="{_MARGIN + 4}">{high:.3g}</text><text x="8" y="{floor + 4}">0</text>'
        f'<text x="{_WIDTH - _MARGIN - 60}" y="{_HEIGHT - 16}">epoch {len(values)}</text>'
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/></svg>\n'
    )
