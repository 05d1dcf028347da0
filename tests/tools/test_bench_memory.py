"""tools/bench_memory.py on a small run: it takes what was expected, within 25 %. Large ones: docs/training.md."""

from __future__ import annotations

import pytest


def test_a_small_run_takes_what_was_expected(load_tool, tmp_path):
    tool = load_tool("bench_memory")
    expected, measured = tool.compare(next(iter(tool.CASES)), tmp_path)
    assert measured > 200e6
    assert expected == pytest.approx(measured, rel=0.25)
