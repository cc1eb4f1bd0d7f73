"""Draws how costs grow, as SVG, from the figures that ``scale.py --save`` and ``relay.py --save`` keep.

python bench/plot.py bench.json docs/performance.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

WIDTH, HEIGHT = 380, 240
LEFT, TOP, RIGHT, BOTTOM = 48, 46, 16, 40
COLOURS: Final = ("#2f6f4f", "#b5562b", "#5a6fb0", "#8a6d1f")
#: The systems of ``relay.py`` that are drawn, by how their names begin there.
SHOWN: Final = {
    "a pipe on trio": "a pipe",
    "trio_cluster": "trio_cluster: master, a handler",
    "sglang-router": "sglang-router",
    "nginx": "nginx",
}
Points = Sequence[tuple[float, float]]


@attrs.frozen
class Panel:
    """One diagram; its abscissa is logarithmic, its ordinate begins at zero."""

    title: str
    x_label: str
    lines: dict[str, Points]

    def draw(self, left: float, top: float) -> list[str]:
        """Return its elements, moved to a place."""
        lines = {name: _clean(points) for name, points in self.lines.items()}
        lines = {name: points for name, points in lines.items() if points}
        every = [point for points in lines.values() for point in points]
        if not every:
            return []
        first, last = min(x for x, _ in every), max(x for x, _ in every)
        step = _step(max(y for _, y in every))
        top_value = step * math.ceil(max(y for _, y in every) / step)
        span = math.log(last / first) or 1.0

        def across(x: float) -> float:
            return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / first) / span

        def up(y: float) -> float:
            return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / top_value

        parts = [f'<g transform="translate({left} {top})">', _text(0, 14, self.title, "title")]
        for count in range(round(top_value / step) + 1):
            y = up(count * step)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{count * step:g}", "y"))
        for x in sorted({x for x, _ in every}):
            parts.append(_text(across(x), HEIGHT - BOTTOM + 16, f"{x:g}", "x"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x_label, "x"))
        keys = []
        for number, (name, points) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]
            keys.append(f'<tspan style="fill: {colour}">{name}</tspan>')
        parts.append(f'<text class="key" x="{LEFT}" y="32">{"   ".join(keys)}</text>')
        return [*parts, "</g>"]


def _clean(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if not math.isnan(y)]


def _step(most: float) -> float:
    """Return a round number of which four to eight reach as far as ``most``."""
    power = 10 ** math.floor(math.log10(max(most, 1e-9) / 4))
    return float(next(power * factor for factor in (1, 2, 5, 10) if most <= 5 * power * factor))


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{text}</text>'


def _tokens(row: dict[str, Any]) -> Points:
    return [(int(name.split()[1]), value) for name, value in row.items() if name.startswith("token ")]


def _line(rows: list[dict[str, float]], over: str, name: str) -> Points:
    return [(row[over], row.get(name, math.nan)) for row in rows]


def panels(kept: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """Return what can be drawn of the figures."""
    found = []
    if rows := kept.get("relay"):
        found.append(
            Panel(
                "CPU in the middle for a token, us",
                "streams, with 20, 50 and 100 ms between tokens",
                {
                    name: _tokens(row)
                    for name, start in SHOWN.items()
                    for row in rows
                    if row["name"].startswith(start)
                },
            )
        )
    if rows := kept.get("streams"):
        crowded = [row for row in rows if row["streams"] > 1]
        found += [
            Panel(
                "CPU of this project for a token, us",
                "streams (3200 tokens/s of all together)",
                {
                    "master": _line(crowded, "streams", "token us"),
                    "worker": _line(crowded, "streams", "worker's us"),
                },
            ),
            Panel(
                "First token when all are opened at once, ms",
                "streams",
                {
                    "the slowest in a hundred": _line(crowded, "streams", "p99 ms"),
                    "the median": _line(crowded, "streams", "first token p50 ms"),
                },
            ),
            Panel(
                "Memory of a stream in which nothing happens, KB",
                "streams",
                {
                    "master": _line(rows, "streams", "KB/stream"),
                    "worker": _line(rows, "streams", "worker's KB"),
                },
            ),
        ]
    if rows := kept.get("workers"):
        found += [
            Panel(
                "CPU of the master for a token, us",
                "workers that 1000 streams are spread over",
                {"master": _line(rows, "workers", "token us")},
            ),
            Panel(
                "CPU of the master for a plain request, us",
                "workers",
                {
                    "a model on all of them": _line(rows, "workers", "with replicas us"),
                    "a model on one of them": _line(rows, "workers", "request us"),
                },
            ),
        ]
    return found


STYLE: Final = """<style>
text { font: 11px system-ui, sans-serif; fill: #555 }
.title { font-size: 12px; font-weight: 600; fill: #333 } .x { text-anchor: middle } .y { text-anchor: end }
.key { font-weight: 600; white-space: pre } .grid { stroke: #8884; stroke-width: 1 }
polyline { fill: none; stroke-width: 2 } rect { fill: #fff }
</style>"""


def draw(kept: dict[str, list[dict[str, Any]]]) -> str:
    """Return the picture."""
    found = panels(kept)
    columns = min(2, len(found))
    width, height = columns * (WIDTH + 20) + 20, math.ceil(len(found) / 2) * (HEIGHT + 20) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        STYLE,
        f'<rect width="{width}" height="{height}"/>',
    ]
    for number, panel in enumerate(found):
        parts += panel.draw(20 + number % 2 * (WIDTH + 20), 20 + number // 2 * (HEIGHT + 20))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Draw."""
    kept, picture = map(Path, sys.argv[1:3])
    picture.write_text(draw(json.loads(kept.read_text())))


if __name__ == "__main__":
    main()
