"""What a run shows and leaves behind: progress, metrics.jsonl, saved weights."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from rwkv_peft.errors import UserError
from rwkv_peft.training.module import TrainingModule

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
    grad_norm: float
    """Before clipping."""
    time: float
    """Seconds since training began."""


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
    """

    def __init__(self, consumers: list[Callable[[StepMetrics], None]]) -> None:
        super().__init__()
        self.consumers = consumers
        self.losses: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.began = self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        # Weighed by its tokens, and divided for accumulation: the mean over devices of the sum is the loss.
        self.losses.append(outputs["loss"].detach().float())
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        loss = trainer.strategy.reduce(torch.stack(self.losses).sum(), reduce_op="mean")
        tokens = module.token_mean.step_tokens
        now = time.perf_counter()
        metrics = StepMetrics(
            step=module.step,
            loss=float(loss),
            lr=module.rate,
            tokens=tokens,
            tokens_per_s=round(tokens / (now - self.last), 1),
            grad_norm=float(module.grad_norm),
            time=round(now - self.began, 3),
        )
        self.losses, self.last = [], now
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            raise UserError(
                f"training step {metrics.step}",
                f"loss {metrics.loss}, gradient norm {metrics.grad_norm}: not finite",
                hint="Nothing of this epoch was saved. A lower --lr_init, or --precision fp32, may help.",
            )
        for consume in self.consumers:
            consume(metrics)


class MetricsFile:
    """Writes every step to a JSON-lines file; `go_on` keeps what is in it."""

    def __init__(self, path: Path, *, go_on: bool = False) -> None:
        mode = "a" if go_on else "w"
        self.file = path.open(mode, encoding="utf-8", buffering=1)  # a line reaches the disk as it is written

    def __call__(self, metrics: StepMetrics) -> None:
        self.file.write(json.dumps(asdict(metrics)) + "\n")


class Progress:
    """The progress bar on a terminal; a plain line every ten seconds elsewhere."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.average: float | None = None
        self.last_line = float("-inf")
        self.width = shutil.get_terminal_size().columns
        self.bar = tqdm(
            total=total_steps, disable=not sys.stderr.isatty(), bar_format="{desc}  {bar}", ncols=self.width, leave=True
        )

    def __call__(self, metrics: StepMetrics) -> None:
        previous = metrics.loss if self.average is None else self.average
        self.average = SMOOTHING * previous + (1 - SMOOTHING) * metrics.loss
        last = metrics.step == self.total_steps
        if not self.bar.disable:
            self.bar.set_description_str(self.line(metrics, self.width), refresh=False)
            self.bar.update()
            if last:
                self.bar.close()
        elif metrics.time - self.last_line >= PLAIN_LINE_SECONDS or last:
            self.last_line = metrics.time
            sys.stderr.write(self.line(metrics) + "\n")

    def line(self, metrics: StepMetrics, width: int | None = None) -> str:
        """One step in words; in a narrow terminal without the average and the gradient norm."""
        left = int(metrics.time / metrics.step * (self.total_steps - metrics.step))
        head = f"train {100 * metrics.step // self.total_steps:3d}%  step {metrics.step}/{self.total_steps}"
        tail = f"{metrics.tokens_per_s:.0f} tok/s  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        loss, rate = f"loss {metrics.loss:.3f}", f"lr {metrics.lr:.1e}"
        full = f"{head}  {loss} (avg {self.average:.3f})  {rate}  gnorm {metrics.grad_norm:.2f}  {tail}"
        return full if width is None or len(full) < width else f"{head}  {loss}  {rate}  {tail}"


class SaveEveryEpoch(pl.Callback):
    """Calls `save(epoch)` on every process after every `every`-th epoch and after the last."""

    def __init__(self, save: Callable[[int], None], first_epoch: int, every: int) -> None:
        self.save, self.first_epoch, self.every = save, first_epoch, every

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every == 0 or done == trainer.max_epochs:
            self.save(self.first_epoch + trainer.current_epoch)
