"""Curves over optimizer steps as inline SVG: one small picture each, in the colours of the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 240
"""Of the picture in its own units: about as wide as a telephone, so that the letters stay readable there."""
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22
"""Margins around the curves, for the labels."""
MOST_POINTS = 400
"""Points of a curve that are drawn; of more, the lowest and the highest of each stretch."""
LOG_FROM = 30
"""Ratio of the largest to the smallest value from which the vertical axis may be logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Args:
    name: for the legend.
    points: (step, value); values that are not finite are left out.
    style: class of the page's style sheet: `raw`, `main` or `other`.
    dots: mark each point.
    """

    name: str
    points: Sequence[Point]
    style: str = "main"
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of the picture."""

    low: float
    high: float
    start: float
    """Where `low` lies."""
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values, evenly apart; powers of ten on a logarithmic axis of two or more."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(powers) >= 2:
                return [10.0**power for power in powers][:: -(-len(powers) // count)]
        step = _round_up((self.high - self.low) / count)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def chart(title: str, curves: Sequence[Curve], *, log: bool = False) -> str:
    """A figure of curves in one frame; "" where there is no point to draw.

    Args:
        log: a logarithmic vertical axis, where values are positive and far apart.
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
    """The points in order; of many, the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = -(-2 * len(points) // MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=_value), max(stretch, key=_value)})
    return kept


def _value(point: Point) -> float:
    return point[1]


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Lowest and highest with a margin; never the same."""
    low, high = min(values), max(values)
    room = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return low - room, high + room


def _round_up(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _grid(x: Axis, y: Axis) -> list[str]:
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
    """2000 -> 2k, 0.00002 -> 2e-5, 0.25 -> 0.25."""
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
    places = [f"{x(step):.1f},{y(value):.1f}" for step, value in curve.points]
    line = f'<polyline class="{curve.style}" points="{" ".join(places)}"/>'
    if not (curve.dots or len(places) == 1):
        return line
    dots = []
    for place in places:
        across, down = place.split(",")
        dots.append(f'<circle class="{curve.style}" cx="{across}" cy="{down}" r="3"/>')
    return line + "".join(dots)
