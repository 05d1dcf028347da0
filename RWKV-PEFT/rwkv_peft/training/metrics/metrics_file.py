"""metrics.jsonl: writing it line by line, and cutting it back when a run resumes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rwkv_peft.console import warn
from rwkv_peft.training.metrics.events import Event, to_row


class LineFile:
    """A text file that is written line by line. If the disk is full, it warns once and training continues."""

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self.path, self.failed = path, False
        self.file = path.open("a" if append else "w", encoding="utf-8", newline="", buffering=1)

    def write(self, line: str) -> None:
        try:
            self.file.write(line)  # together with earlier lines that could not be written
        except OSError as error:
            if not self.failed:
                warn(f"{self.path}: cannot be written ({error}). Training continues.")
            self.failed = True

    def close(self) -> None:
        """Write what is left. A full disk has been reported before."""
        with contextlib.suppress(OSError):
            self.file.close()


class MetricsFile(LineFile):
    """Writes every event as a line of JSON."""

    def __call__(self, event: Event) -> None:
        self.write(json.dumps(to_row(event)) + "\n")


def cut_metrics(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Remove the lines after optimizer step `step` from a metrics.jsonl, in place, and return the remaining ones.

    A last line that was cut off by a kill or a full disk is removed, too. Lines of an earlier run in the same folder
    (`--epoch_begin`) stay.

    Args:
        path: the file; if it does not exist, the result is empty.
        step: None keeps every complete line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and not _is_up_to(lines[-1], step):
        lines.pop()
    os.truncate(path, sum(map(len, lines)))
    return [json.loads(line) for line in lines]


def _is_up_to(line: bytes, step: int | None) -> bool:
    try:
        last = json.loads(line)["step"]
        return line.endswith(b"\n") and (step is None or last <= step)
    except ValueError:
        return False
