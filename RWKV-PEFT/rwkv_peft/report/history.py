"""What metrics.jsonl tells of a run, also of one that was stopped, or went on several times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rwkv_peft.training.metrics.recorder import Average

Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """Lines of metrics.jsonl, in the order of their steps."""

    steps: Sequence[Row]
    """Optimizer steps: StepMetrics by name."""
    validations: Sequence[Row]
    """Lines with `val_loss`."""
    seconds: float
    """Of training, over all processes of the run."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a number that both or either kind of line may have."""
        rows = self.validations if name.startswith("val_") else self.steps
        return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]

    def smoothed_loss(self) -> list[tuple[float, float]]:
        """As on the progress line."""
        smooth = Average()
        return [(step, smooth(loss)) for step, loss in self.points("loss")]

    def typical(self, name: str) -> float | None:
        """The median over the steps but the first of each clock, which is slower; None where there are none."""
        rows = [row for row in self.steps if not row["first"]] or self.steps
        values = [row[name] for row in rows if is_number(row.get(name))]
        return median(values) if values else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_history(path: Path) -> History:
    """The lines of a metrics.jsonl; a line that is cut off, and anything else that is no event, is passed over.

    A step that comes again replaces the earlier one and all after it: the run went on from a checkpoint before its end.
    Where steps begin anew at 1, as with `--epoch_begin`, they count on.

    Raises:
        OSError: the file cannot be read.
    """
    rows: list[Row] = []
    offset, last = 0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _event(line)
        if row is None:
            continue
        step = row["step"]
        if step < last and step <= 1:
            offset += last
        elif step <= last:
            rows = [old for old in rows if not _replaced(old, row, step + offset)]
        last = step
        rows.append({**row, "step": step + offset})
    return History(*_timed(rows))


def _event(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    good = isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] >= 0
    return row if good else None


def _replaced(old: Row, new: Row, step: int) -> bool:
    same_kind = ("val_loss" in old) == ("val_loss" in new)
    return old["step"] > step or (old["step"] == step and same_kind)


def _timed(rows: Sequence[Row]) -> tuple[list[Row], list[Row], float]:
    """Steps, each with its `seconds` and whether it is a process's `first`; validations; seconds in all."""
    steps, total, before = [], 0.0, None
    for row in rows:
        if "val_loss" in row:
            continue
        now = row["time"] if is_number(row.get("time")) else before or 0.0
        first = before is None or now < before
        seconds = now if first else now - before
        steps.append({**row, "seconds": seconds, "first": first})
        total, before = total + seconds, now
    return steps, [row for row in rows if "val_loss" in row], total
