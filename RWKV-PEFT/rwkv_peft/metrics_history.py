"""Reading a run's metrics.jsonl, also of a run that was interrupted or resumed; and the averages shown of it.

The progress line and the report share the averaged loss and the format of durations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

SMOOTHING = 0.95
"""Weight of the past in the averaged loss."""

Row = dict[str, Any]


class Average:
    """Exponential moving average of the loss, corrected for its start as in Adam."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """Add a value and return the average. A value that is not finite does not change the average."""
        if math.isfinite(value):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * value
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight if self._weight else value


def clock(seconds: float) -> str:
    """Format a duration: 3725.4 -> 1:02:05."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


@dataclass(frozen=True)
class History:
    """The lines of a metrics.jsonl, in the order of their steps."""

    steps: Sequence[Row]
    """One line per optimizer step, with the fields of StepMetrics, `seconds` (of this step) and `first` (whether it is
    the first step of a process)."""
    validations: Sequence[Row]
    """The lines with a `val_loss`."""
    seconds: float
    """Training time of all processes of the run."""

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) for each line that has a number of this name."""
        rows = self.validations if name.startswith("val_") else self.steps
        return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]

    def smoothed_loss(self) -> list[tuple[float, float]]:
        """Return (step, averaged loss), as on the progress line."""
        smooth = Average()
        return [(step, smooth(loss)) for step, loss in self.points("loss")]

    def typical(self, name: str) -> float | None:
        """Return the median over all steps; None without steps. The first step of a process is slower and not used."""
        rows = [row for row in self.steps if not row["first"]] or self.steps
        values = [row[name] for row in rows if is_number(row.get(name))]
        return median(values) if values else None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_history(path: Path) -> History:
    """Read a metrics.jsonl. An incomplete last line, and other lines that are not events, are ignored.

    If a step occurs again, the run was resumed from a checkpoint before it: the line replaces the earlier line and all
    lines after that. If the steps start at 1 again, as with `--epoch_begin`, they are counted on.

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
            rows = [old for old in rows if not _is_replaced(old, row, step + offset)]
        last = step
        rows.append({**row, "step": step + offset})
    return History(*_with_times(rows))


def _event(line: str) -> Row | None:
    """Return a line as an event; None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    valid = isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] >= 0
    return row if valid else None


def _is_replaced(old: Row, new: Row, step: int) -> bool:
    same_kind = ("val_loss" in old) == ("val_loss" in new)
    return old["step"] > step or (old["step"] == step and same_kind)


def _with_times(rows: Sequence[Row]) -> tuple[list[Row], list[Row], float]:
    """Return the steps with `seconds` and `first`, the validations, and the total training time in seconds."""
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
