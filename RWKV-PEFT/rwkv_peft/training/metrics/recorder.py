"""Turns results of optimizer steps into events, and hands them to everything that shows or stores metrics."""

from __future__ import annotations

import time

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv_peft.training.metrics.events import Event, StepMetrics
from rwkv_peft.training.metrics.loggers import Consumer
from rwkv_peft.training.step import MicroBatch, TrainingModule


class Recorder:
    """Measures time and reports every step.

    Args:
        consumers: called with every event; only the main process has any.
        seconds: of training before this process.
    """

    def __init__(self, consumers: list[Consumer], seconds: float = 0.0) -> None:
        self.consumers, self._earlier = consumers, seconds
        self.last_loss: float | None = None
        """Loss of the last step; None before the first."""

    def start(self) -> None:
        """Start the clock."""
        self._last = time.perf_counter()
        self._began = self._last - self._earlier

    def record(self, trainer: pl.Trainer, module: TrainingModule, micro_batches: list[MicroBatch]) -> None:
        """Report the step that was just made, and end the run if bad steps continue.

        Raises:
            UserError: `--max_bad_steps` steps in a row were skipped.
        """
        result, now = module.result, time.perf_counter()
        samples = None
        if result.skipped:
            samples = _of_all_devices(module, torch.cat([batch["sample"] for batch in micro_batches]))
        metrics = StepMetrics(
            step=module.step,
            loss=result.loss,
            lr=result.lr,
            tokens=result.tokens,
            tokens_per_s=round(result.tokens / (now - self._last), 1),
            grad_norm=result.grad_norm,
            time=self.seconds(now),
            skipped=result.skipped,
            samples=samples,
        )
        self._last, self.last_loss = now, result.loss
        self.report(metrics)
        module.guard.stop_after_bad_steps(metrics.step, metrics.loss, metrics.lr, samples or [])

    def report(self, event: Event) -> None:
        """Hand an event to every consumer."""
        for consume in self.consumers:
            consume(event)

    def seconds(self, now: float | None = None) -> float:
        """Return the seconds of training so far, rounded to milliseconds."""
        return round((time.perf_counter() if now is None else now) - self._began, 3)

    def exclude(self, seconds: float) -> None:
        """Do not count the last `seconds`, which were spent on something else than training."""
        self._began += seconds
        self._last += seconds


def _of_all_devices(module: TrainingModule, samples: Tensor) -> list[list[int]]:
    """Return (epoch, index) of each row of a step on every device, from this device's samples (n, 2)."""
    return sorted(module.all_gather(samples).view(-1, 2).tolist())
