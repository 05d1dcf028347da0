"""One loss for an optimizer step: the mean over its trained tokens, however batches and devices share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch


class TokenMean:
    """Weighs each batch's mean loss by its share of all trained tokens of its optimizer step.

    A mean over each batch alone would count a token the more, the fewer train beside it. One all-reduce per step.
    """

    def __init__(self) -> None:
        self.step_tokens = 0
        """Trained tokens of this optimizer step, of all batches, on all devices."""

    def begin_batch(self, trainer: pl.Trainer, batch: Mapping[str, Any]) -> None:
        """Before each batch of `WindowLoader`, on every process; the first of a window counts for all of it."""
        if "window_tokens" in batch:
            own = torch.tensor(batch["window_tokens"], device=trainer.strategy.root_device)
            self.step_tokens = int(trainer.strategy.reduce(own, reduce_op="sum"))

    def weight(self, trainer: pl.Trainer, batch: Mapping[str, Any]) -> float:
        """What the batch's mean loss is to be multiplied by, in view of the trainer's own divisions.

        Lightning divides by the accumulated batches, also where an epoch's last step has fewer; gradients are averaged
        over devices.
        """
        divided_by = trainer.world_size * trainer.accumulate_grad_batches
        return batch["tokens"] / max(1, self.step_tokens) * divided_by
