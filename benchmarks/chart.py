# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ratios as a drawing: one line per workload, one mark per yardstick, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from benchmarks.measuring import Row

COLOURS = {  # distinguishable for people with colour blindness
    "gunicorn": "#0072b2",
    "gunicorn, fsync": "#003f66",
    "our worker": "#56b4e9",
    "nginx": "#009e73",
    "nginx, tuned": "#e69f00",
    "Varnish": "#d55e00",
    "Azure SDK": "#cc79a7",
    "Azurite": "#888888",
    "default rules": "#000000",
}
LABELS, WIDTH, RIGHT, LINE, TOP = 320, 480, 40, 22, 58  # pixels
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def svg(rows: Iterable[Row]) -> str:
    """A drawing of all rows that have a yardstick, as SVG."""
    compared = [row for row in rows if row.ratios]
    systems = [system for system in COLOURS if any(system in row.ratios for row in compared)]
    height = TOP + LINE * len(compared) + 30
    width = LABELS + WIDTH + RIGHT
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(10, 18, "our speed as a share of theirs: right of 1, we are faster"),
        *_legend(systems),
    ]
    ticks = _ticks(compared)
    parts += _grid(ticks, height)
    for index, row in enumerate(compared):
        parts += _line(row, TOP + LINE * index + LINE // 2, ticks)
    return "\n".join([*parts, "</svg>", ""])


def _ticks(rows: Iterable[Row]) -> Sequence[float]:
    """The ticks that enclose all ratios."""
    ratios = [ratio for row in rows for ratio in row.ratios.values()] or [1.0]
    low = max([tick for tick in TICKS if tick <= min(ratios)], default=TICKS[0])
    high = min([tick for tick in TICKS if tick >= max(ratios)], default=TICKS[-1])
    return [tick for tick in TICKS if min(low, 0.5) <= tick <= max(high, 2)]


def position(ratio: float, ticks: Sequence[float]) -> float:
    """The distance of a ratio from the left, in pixels; one beyond the ends is drawn at the end.

    >>> position(1, (0.5, 1, 2)) == LABELS + WIDTH / 2, position(9, (0.5, 1, 2)) == LABELS + WIDTH
    (True, True)
    """
    clamped = min(max(ratio, ticks[0]), ticks[-1])
    return LABELS + WIDTH * math.log(clamped / ticks[0]) / math.log(ticks[-1] / ticks[0])


def _legend(systems: Iterable[str]) -> Iterator[str]:
    for index, system in enumerate(systems):
        x = 20 + 105 * index
        yield f'<circle cx="{x}" cy="34" r="5" fill="{COLOURS[system]}"/>'
        yield _text(x + 9, 38, system)


def _grid(ticks: Iterable[float], height: int) -> Iterator[str]:
    ticks = list(ticks)
    for tick in ticks:
        x = position(tick, ticks)
        stroke = "#000000" if tick == 1 else "#dddddd"
        yield f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - 26}" stroke="{stroke}"/>'
        yield _text(x, height - 10, f"{tick:g}", "middle")


def _line(row: Row, y: int, ticks: Sequence[float]) -> Iterator[str]:
    yield _text(LABELS - 14, y + 4, f"{row.group}: {row.title}", "end")
    for system, ratio in row.ratios.items():
        x = position(ratio, ticks)
        hint = f"<title>{escape(system)} {ratio:.2f}</title>"
        yield f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{COLOURS[system]}">{hint}</circle>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="#222222">{escape(text)}</text>'
