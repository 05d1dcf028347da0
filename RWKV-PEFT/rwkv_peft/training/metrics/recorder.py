"""What a run shows and leaves behind: progress, metrics.jsonl, saved weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.optim.bad_steps import shown

SMOOTHING = 0.95
"""Weight of the past in the averaged loss on the progress line."""
PLAIN_LINE_SECONDS = 10.0
"""Time between progress lines where output is not a terminal."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; a line of metrics.jsonl."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean over the step's trained tokens, of all its batches and devices."""
    lr: float
    tokens: int
    """Trained tokens of this step, on all devices."""
    tokens_per_s: float
    """Trained tokens: what learning gets out of the time. Padding and masked tokens do not count."""
    grad_norm: float
    """Before clipping."""
    time: float
    """Seconds of training, those before a resume counted."""
    skipped: str | None = None
    """Why the step changed nothing, where it was skipped."""
    samples: list[list[int]] | None = None
    """Epoch and index of the samples of a skipped step, on all devices."""


def row(event: Any) -> dict[str, Any]:
    """A dataclass as a line of JSON: null for what is not a finite number, nothing for what there is not (None)."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(event).items()
        if value is not None
    }


class StepCallback(pl.Callback):
    """Calls `after_step` once for every optimizer step, where Lightning's own hooks come with every batch of it."""

    def __init__(self) -> None:
        self._steps_seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self.after_step(trainer, module)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """What to do after an optimizer step, on every process; `module.step` counts it already."""
        raise NotImplementedError


class StepRecorder(StepCallback):
    """Gathers what each optimizer step did, over accumulated batches and devices, and hands it on.

    Args:
        consumers: called with every StepMetrics; only the main process has any.
        seconds: of training before this process.
    """

    def __init__(self, consumers: list[Callable[[StepMetrics], None]], seconds: float = 0.0) -> None:
        super().__init__()
        self.consumers, self._earlier = consumers, seconds
        self.losses: list[Tensor] = []
        self.samples: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.last = time.perf_counter()
        self.began = self.last - self._earlier

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        # Weighed by its tokens, and divided for accumulation: the mean over devices of the sum is the loss.
        self.losses.append(outputs["loss"].detach().float())
        self.samples.append(batch["sample"])
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        loss = trainer.strategy.reduce(torch.stack(self.losses).sum(), reduce_op="mean")
        tokens = module.token_mean.step_tokens
        samples = _of_all_devices(module, torch.cat(self.samples)) if module.guard.skipped else None
        now = time.perf_counter()
        metrics = StepMetrics(
            step=module.step,
            loss=float(loss),
            lr=module.rate,
            tokens=tokens,
            tokens_per_s=round(tokens / (now - self.last), 1),
            grad_norm=module.guard.norm,
            time=self.seconds(now),
            skipped=module.guard.skipped,
            samples=samples,
        )
        self.losses, self.samples, self.last = [], [], now
        for consume in self.consumers:
            consume(metrics)
        module.guard.stop_if_hopeless(metrics.step, metrics.loss, metrics.lr, samples or [])

    def seconds(self, now: float | None = None) -> float:
        """Seconds of training so far, to milliseconds."""
        return round((time.perf_counter() if now is None else now) - self.began, 3)

    def leave_out(self, seconds: float) -> None:
        """Count the last `seconds`, spent on something else, neither for the step nor for the run."""
        self.began += seconds
        self.last += seconds


def _of_all_devices(module: TrainingModule, samples: Tensor) -> list[list[int]]:
    """(epoch, index) of each row of a step; samples (n, 2), on every process."""
    return sorted(module.all_gather(samples).view(-1, 2).tolist())


class Average:
    """An average in which the past weighs SMOOTHING, and less while there is little of it (as in Adam's means)."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """The average with this value in it; one that is not finite leaves it as it was."""
        if math.isfinite(value):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * value
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight if self._weight else value


def cut_metrics(path: Path, step: int | None) -> list[dict]:
    """Cut the lines after `step` (None: nothing whole) off a metrics.jsonl, in place, and return what is left; [] where
    there is no file.

    A line that a kill or a full disk left unfinished goes too. What an earlier run left before (--epoch_begin) stays.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and not _is_until(lines[-1], step):
        lines.pop()
    os.truncate(path, sum(map(len, lines)))
    return [json.loads(line) for line in lines]


def _is_until(line: bytes, step: int | None) -> bool:
    try:
        last = json.loads(line)["step"]
        return line.endswith(b"\n") and (step is None or last <= step)
    except ValueError:
        return False


class LineFile:
    """A file that lines are written to as they come. A full disk costs a warning, not the run."""

    def __init__(self, path: Path, *, go_on: bool = False) -> None:
        self.path, self.failed = path, False
        self.file = path.open("a" if go_on else "w", encoding="utf-8", newline="", buffering=1)

    def write(self, line: str) -> None:
        try:
            self.file.write(line)  # with what could not be written before
        except OSError as error:
            if not self.failed:
                sys.stderr.write(f"warning: {self.path}: cannot be written ({error}). Training goes on.\n")
            self.failed = True

    def close(self) -> None:
        """Write what is left; a full disk was told of."""
        with contextlib.suppress(OSError):
            self.file.close()


class MetricsFile(LineFile):
    """Writes every event to a JSON-lines file; `go_on` keeps what is in it."""

    def __call__(self, event: Any) -> None:
        self.write(json.dumps(row(event)) + "\n")


class Progress:
    """The progress bar on a terminal; a plain line every ten seconds elsewhere. Steps alone move it.

    Args:
        total_steps: of the run.
        first_step: of them, those done by earlier processes.
        losses: of these.
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

    def __call__(self, metrics: StepMetrics) -> None:
        if not isinstance(metrics, StepMetrics):
            return
        self.first = self.first or metrics
        self.average = self.smooth(metrics.loss)
        if metrics.skipped:
            where = shown(metrics.samples or [])
            self.bar.write(f"step {metrics.step} skipped: {metrics.skipped}; samples {where}", file=sys.stderr)
        if not self.bar.disable:
            self.bar.set_description_str(self.line(metrics, terminal_width()), refresh=False)
            self.bar.update(metrics.step - self.bar.n)
            if metrics.step == self.total_steps:
                self.close()
        elif metrics.time - self.last_line >= PLAIN_LINE_SECONDS or metrics.step == self.total_steps:
            self.last_line = metrics.time
            sys.stderr.write(self.line(metrics) + "\n")

    def close(self) -> None:
        """Leave the bar as it is, and the cursor below it."""
        self.bar.close()

    def line(self, metrics: StepMetrics, width: int | None = None) -> str:
        """One step in words; what a terminal of `width` columns has no room for is left out."""
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
        for least in (4, 2, 3, 5, 6, 1):  # what is missed least goes first
            if width is None or sum(map(len, parts)) < width:
                break
            parts[least] = ""
        return "".join(parts)

    def seconds_left(self, metrics: StepMetrics) -> float:
        """From the pace of this process's steps: a run that goes on begins at another step than 1. The first step is
        slower than the rest, so it counts only while there is no other."""
        steps = metrics.step - self.first.step if self.first else 0
        if steps > 0:
            pace = (metrics.time - self.first.time) / steps
        else:
            pace = metrics.tokens / metrics.tokens_per_s if metrics.tokens_per_s else 0.0
        return pace * (self.total_steps - metrics.step)


def clock(seconds: float) -> str:
    """3725.4 -> 1:02:05."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def terminal_width() -> int:
    """Columns of the terminal that the progress bar is on."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class SaveEveryEpoch(pl.Callback):
    """Calls `save(epoch)` on every process after every `every`-th epoch and after the last, also a short one.

    Args:
        save: whatever it raises as a CheckpointError (a full disk) ends the run after its last epoch only.
        first_epoch: number of the run's first epoch.
        every: see above.
        done: epochs that earlier processes made of the run.
    """

    def __init__(self, save: Callable[[int], None], first_epoch: int, every: int, done: int = 0) -> None:
        self.save, self.first_epoch, self.every, self.done = save, first_epoch, every, done

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        done = self.done + trainer.current_epoch + 1
        last = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if done % self.every and not last:
            return
        try:
            self.save(self.first_epoch + done - 1)
        except CheckpointError as error:
            if last:
                raise
            sys.stderr.write(f"warning: {error} Training goes on.\n")
