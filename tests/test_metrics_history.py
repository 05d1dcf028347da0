"""Reading metrics.jsonl of complete, interrupted and resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rwkv_peft.metrics_history import History, read_history


def row(step: int, time: float, loss: float = 1.0, tokens_per_s: float = 10.0) -> dict:
    return {"step": step, "loss": loss, "tokens": 10, "tokens_per_s": tokens_per_s, "time": time}


def validation(step: int, loss: float) -> dict:
    return {"step": step, "val_loss": loss, "val_ppl": 2.0, "time": 0.0}


def history(path: Path, *rows: dict, tail: str = "") -> History:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return read_history(path)


def test_steps_and_validations(tmp_path):
    read = history(tmp_path / "m", validation(0, 3.0), row(1, 5.0), row(2, 6.0, 4.0), validation(2, 2.0), row(3, 7.0))
    assert read.points("loss") == [(1, 1.0), (2, 4.0), (3, 1.0)]
    assert read.points("val_loss") == [(0, 3.0), (2, 2.0)]
    assert read.seconds == 7.0
    assert read.typical("seconds") == 1.0, "the first step is not typical"
    assert read.points("nothing") == []


def test_a_resumed_run_counts_each_step_once(tmp_path):
    """Killed after step 5, and resumed from step 3, where it validates again."""
    before = [row(step, 10 + step, loss=0.0) for step in range(1, 6)]
    after = [row(step, 20 + step, loss=9.0) for step in range(4, 7)]
    read = history(tmp_path / "m", *before, validation(4, 5.0), validation(3, 1.0), *after)
    assert read.points("loss") == [(1, 0), (2, 0), (3, 0), (4, 9), (5, 9), (6, 9)]
    assert read.points("val_loss") == [(3, 1.0)]


def test_the_times_of_all_processes_are_added(tmp_path):
    read = history(tmp_path / "m", row(1, 5.0), row(2, 7.0), row(3, 4.0), row(4, 5.0))
    assert read.seconds == 12.0
    assert [step["first"] for step in read.steps] == [True, False, True, False]


def test_steps_that_start_at_1_again_are_counted_on(tmp_path):
    read = history(tmp_path / "m", *(row(step, step) for step in (1, 2, 3, 1, 2)))
    assert [step for step, _ in read.points("loss")] == [1, 2, 3, 4, 5]


def test_damaged_lines_are_ignored(tmp_path):
    odd = '[1]\n{"step": "x"}\n{"step": 2, "loss": null, "time": 3.0}\nnoise\n{"step": 3, "loss": NaN, "time": 4}\n{"st'
    read = history(tmp_path / "m", row(1, 1.0), tail=odd)
    assert [step["step"] for step in read.steps] == [1, 2, 3]
    assert [step for step, _ in read.points("loss")] == [1, 3]
    assert read.smoothed_loss()[-1] == (3, 1.0)
    empty = history(tmp_path / "m")
    assert (empty.points("loss"), empty.seconds, empty.typical("loss")) == ([], 0.0, None)
    with pytest.raises(OSError, match="gone"):
        read_history(tmp_path / "gone")
