"""The progress line on the terminal."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from rwkv_peft.metrics_history import Average, clock
from rwkv_peft.training.metrics.events import Event, StepMetrics
from rwkv_peft.training.optim.bad_steps import format_samples

PLAIN_LINE_SECONDS = 10.0
"""Seconds between progress lines if the output is not a terminal."""


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every ten seconds. Only optimizer steps advance it.

    Args:
        total_steps: optimizer steps of the run.
        first_step: steps that earlier processes of the run have made.
        losses: of these steps, for the average.
    """

    def __init__(self, total_steps: int, first_step: int = 0, losses: Sequence[float] = ()) -> None:
        self.total_steps = total_steps
        self.smooth = Average()
        self.average = math.nan
        for loss in losses:
            self.smooth(loss)
        self.first: StepMetrics | None = None
        self.last_line = float("-inf")
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            disable=not terminal,
            bar_format="{desc}  {bar}",
            dynamic_ncols=True,
        )

    def __call__(self, metrics: Event) -> None:
        if not isinstance(metrics, StepMetrics):
            return
        self.first = self.first or metrics
        self.average = self.smooth(metrics.loss)
        if metrics.skipped:
            samples = format_samples(metrics.samples or [])
            self.bar.write(f"step {metrics.step} skipped: {metrics.skipped}; samples {samples}", file=sys.stderr)
        if not self.bar.disable:
            self.bar.set_description_str(self.line(metrics, terminal_width()), refresh=False)
            self.bar.update(metrics.step - self.bar.n)
            if metrics.step == self.total_steps:
                self.close()
        elif metrics.time - self.last_line >= PLAIN_LINE_SECONDS or metrics.step == self.total_steps:
            self.last_line = metrics.time
            self.bar.write(self.line(metrics), file=sys.stderr)

    def close(self) -> None:
        """Leave the bar on the screen and move the cursor below it."""
        self.bar.close()

    def line(self, metrics: StepMetrics, width: int | None = None) -> str:
        """Return the progress line; parts that do not fit into `width` columns are omitted."""
        norm = f"{metrics.grad_norm:.2f}" if metrics.grad_norm >= 0.01 else f"{metrics.grad_norm:.1e}"
        parts = [
            f"train {100 * metrics.step // self.total_steps:3d}%  step {metrics.step}/{self.total_steps}",
            f"  loss {metrics.loss:.3f}",
            f" (avg {self.average:.3f})",
            f"  lr {metrics.lr:.1e}",
            f"  gnorm {norm}",
            f"  {metrics.tokens_per_s:.0f} tok/s",
            f"  left {clock(self.seconds_left(metrics))}",
        ]
        for least_important in (4, 2, 3, 5, 6, 1):
            if width is None or sum(map(len, parts)) < width:
                break
            parts[least_important] = ""
        return "".join(parts)

    def seconds_left(self, metrics: StepMetrics) -> float:
        """Estimate the remaining seconds from the steps of this process.

        The first step is slower than the others, so it only counts while there is no second one.
        """
        steps = metrics.step - self.first.step if self.first else 0
        if steps > 0:
            pace = (metrics.time - self.first.time) / steps
        else:
            pace = metrics.tokens / metrics.tokens_per_s if metrics.tokens_per_s else 0.0
        return pace * (self.total_steps - metrics.step)


def terminal_width() -> int:
    """Return the number of columns of the terminal that shows the progress bar."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
