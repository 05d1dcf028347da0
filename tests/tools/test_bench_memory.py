"""tools/bench_memory.py on a small run: the estimate is within 25 %. For large runs, see docs/training.md."""

from __future__ import annotations

import pytest


def test_a_small_run_needs_the_estimated_memory(load_tool, tmp_path):
    tool = load_tool("bench_memory")
    expected, measured = tool.compare(next(iter(tool.CASES)), tmp_path)
    assert measured > 200e6
    assert expected == pytest.approx(measured, rel=0.25)
