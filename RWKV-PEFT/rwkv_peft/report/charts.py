"""Line charts over optimizer steps, as inline SVG in the colors of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 240
"""Size of a chart in SVG units. It is sized for a phone screen, so the labels are readable there."""
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22
"""Margins for the labels."""
MAX_POINTS = 400
"""Largest number of points drawn per curve."""
LOG_FROM = 30
"""Smallest ratio of the largest to the smallest value for a logarithmic axis."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One curve of a chart."""

    name: str
    """Text in the legend."""
    points: Sequence[Point]
    """(step, value) pairs; values that are not finite are not drawn."""
    style: str = "main"
    """A class of the page's style sheet: raw, main or other."""
    dots: bool = False
    """Whether each point is marked."""


@dataclass(frozen=True)
class Axis:
    """Maps a range of values to a range of SVG coordinates."""

    low: float
    high: float
    start: float
    """Coordinate of `low`."""
    end: float
    """Coordinate of `high`."""
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values at equal distances, or powers of ten on a logarithmic axis."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(powers) >= 2:
                return [10.0**power for power in powers][:: -(-len(powers) // count)]
        step = _round_up((self.high - self.low) / count)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def chart(title: str, curves: Sequence[Curve], *, log: bool = False) -> str:
    """Return a figure with all curves in one chart, or "" if there is no point to draw.

    Args:
        log: use a logarithmic vertical axis if all values are positive and their range is large.
    """
    curves = [
        Curve(curve.name, thin([p for p in curve.points if math.isfinite(p[1])]), curve.style, curve.dots)
        for curve in curves
    ]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    steps, values = zip(*(point for curve in curves for point in curve.points), strict=True)
    x = Axis(*_span(steps, 0.0), LEFT, WIDTH - RIGHT)
    log = log and min(values) > 0 and max(values) / min(values) >= LOG_FROM
    low, high = (min(values) / 1.1, max(values) * 1.1) if log else _span(values, 0.05)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    names = "".join(f'<span class="{curve.style}">{escape(curve.name)}</span>' for curve in curves)
    legend = f'<div class="legend">{names}</div>' if len(curves) > 1 else ""
    note = " (logarithmic)" if log else ""
    return "\n".join(
        [
            f"<figure><figcaption>{escape(title + note)}</figcaption>{legend}",
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            *_grid(x, y),
            *(_drawn(curve, x, y) for curve in curves),
            "</svg></figure>",
        ]
    )


def thin(points: Sequence[Point]) -> list[Point]:
    """Return at most about MAX_POINTS points in order: the lowest and highest of each interval, which keeps spikes."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = -(-2 * len(points) // MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        kept += sorted({min(interval, key=_value), max(interval, key=_value)})
    return kept


def _value(point: Point) -> float:
    return point[1]


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Return the lowest and highest value, with a margin; the two always differ."""
    low, high = min(values), max(values)
    room = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return low - room, high + room


def _round_up(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _grid(x: Axis, y: Axis) -> list[str]:
    """Return grid lines and labels of both axes."""
    lines = []
    for value in y.ticks(5):
        at = y(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for value in x.ticks(5):
        if value == int(value):
            at = min(x(value), WIDTH - RIGHT - 8)
            lines.append(f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label(value)}</text>')
    return lines


def label(value: float) -> str:
    """Format a number: 2000 -> 2k, 0.00002 -> 2e-5, 0.25 -> 0.25."""
    size = abs(value)
    if size < 1e-9:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e3:
        return f"{value / 1e3:.4g}k"
    if size < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}"


def _drawn(curve: Curve, x: Axis, y: Axis) -> str:
    """Return a curve as a line, with dots if it wants them or has a single point."""
    places = [f"{x(step):.1f},{y(value):.1f}" for step, value in curve.points]
    line = f'<polyline class="{curve.style}" points="{" ".join(places)}"/>'
    if not (curve.dots or len(places) == 1):
        return line
    dots = []
    for place in places:
        across, down = place.split(",")
        dots.append(f'<circle class="{curve.style}" cx="{across}" cy="{down}" r="3"/>')
    return line + "".join(dots)
