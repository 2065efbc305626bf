"""Line charts as SVG text for a page: they take the page's colours, and need nothing that is not in Python.

What belongs here: from points to SVG. Pictures for elsewhere are `curves.py`.
"""

import html
import math
from dataclasses import dataclass

MOST_POINTS = 400  # of a line; more than there are pixels between


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, its points (x, y), and the CSS class that colours it."""

    name: str
    points: list[tuple[float, float]]
    style: str = "line-a"
    marked: bool = False


def line_chart(
    lines: list[Line],
    label: str,
    width: int = 360,
    height: int = 200,
    robust: bool = False,
) -> str:
    """A chart of lines that share both axes.

    Args:
        lines: at least one with a point.
        label: what it shows, for those who cannot see it.
        width, height: in units of the page at its full size.
        robust: leave out of the scale what only the first tenth of a line reaches, as a loss at its start.
    """
    lines = [Line(line.name, _thin(line.points), line.style, line.marked) for line in lines if line.points]
    left, right, top, bottom = 52, 18, 10, 24
    xs = [x for line in lines for x, _ in line.points]
    low, high = _scale(lines, robust)
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (min(max(y, low), high) - low) / (high - low)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label, quote=True)}">']
    for tick in _ticks(low, high, max(3, height // 45)):
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in _ticks(x_low, x_high, max(3, width // 90)):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number(tick)}</text>')
    for line in lines:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.marked or len(placed) == 1:
            parts += [f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    parts.append("</svg>")
    return "".join(parts)


def number(value: float) -> str:
    """A number as on an axis: 0.02, 3.5, 12k, 1.5M."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.3g}"


def _scale(lines: list[Line], robust: bool) -> tuple[float, float]:
    values = []
    for line in lines:
        some = [y for _, y in line.points]
        values += some[len(some) // 10 :] if robust else some
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    # What cannot be negative is not shown as if it could.
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, `most` of them at most: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point and the last one."""
    every = -(-len(points) // MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
