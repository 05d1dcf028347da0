"""Charts: every point is inside the frame and at the right place, and spikes stay visible."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from rwkv_peft.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Curve, chart, label, thin


def drawn(html: str) -> list[list[tuple[float, float]]]:
    """Return the coordinates of each line of a figure."""
    lines = [node.get("points") for node in ElementTree.fromstring(html).iter("polyline")]
    return [[tuple(map(float, place.split(","))) for place in line.split()] for line in lines]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[3.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [1.0, 1e6, 3.0], [-5.0, 2.0], [math.nan, 4.0, math.inf, 2.0]],
)
def test_points_lie_in_the_frame(values, log):
    html = chart("a < b & c", [Curve("x", list(enumerate(values, 1)))], log=log)
    (line,) = drawn(html)
    assert len(line) == sum(map(math.isfinite, values))
    for x, y in line:
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM
    assert ("circle" in html) == (len(line) == 1), "a single point would be an invisible line"


def test_heights_follow_the_values():
    """On a linear axis the arithmetic mean is half-way, on a logarithmic axis the geometric mean."""
    (line,) = drawn(chart("t", [Curve("x", [(1, 0.0), (2, 50.0), (3, 100.0)])]))
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.1)
    (line,) = drawn(chart("t", [Curve("x", [(1, 0.1), (2, 10.0), (3, 1000.0)])], log=True))
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.1)
    assert line[0][1] > line[2][1], "up is more"


def test_nothing_to_draw_is_no_figure():
    assert chart("t", [Curve("x", [(1, math.nan)]), Curve("y", [])]) == ""


def test_thinning_keeps_order_and_extremes():
    points = [(step, math.sin(step / 900)) for step in range(50_000)]
    points[31_234] = (31_234, 40.0)
    points[999] = (999, -40.0)
    kept = thin(points)
    assert len(kept) <= 400
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {(31_234, 40.0), (999, -40.0)} <= set(kept) <= set(points)


def test_ticks_are_round_and_in_range():
    assert Axis(0.3, 5.2, 0, 1).ticks(5) == [1, 2, 3, 4, 5]
    assert Axis(0.05, 2000, 0, 1, log=True).ticks(5) == [0.1, 1, 10, 100, 1000]
    assert [label(v) for v in (0, 0.25, 2e-5, 1.5e-5, 2000, 1_500_000, -3)] == [
        "0", "0.25", "2e-5", "1.5e-5", "2k", "1.5M", "-3",
    ]  # fmt: skip
