"""One training step, as Lightning wants it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor

from rwkv_peft.config import OptimConfig
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.lisa import BlockDraw
from rwkv_peft.training.normalisation import TokenMean
from rwkv_peft.training.optim import build_optimizer
from rwkv_peft.training.schedule import learning_rate


class TrainingModule(pl.LightningModule):
    """Loss, optimizer and learning rate around a model.

    Args:
        model: with its adapters in place and its trained parameters marked.
        optim: the optimizer's settings.
        total_steps: optimizer steps of the run, for the schedule.
        draw: of method LISA; draws the blocks that train.
    """

    def __init__(self, model: RWKV6, optim: OptimConfig, total_steps: int, draw: BlockDraw | None = None) -> None:
        super().__init__()
        self.model, self.optim, self.total_steps, self.draw = model, optim, total_steps, draw
        self.rate = 0.0
        """Learning rate of this step, before the groups' multipliers."""
        self.grad_norm: float | None = None
        """Global gradient norm of the last step, before clipping."""
        self.token_mean = TokenMean()
        self.first_step = 0
        """Optimizer steps that earlier processes made of this run."""

    @property
    def step(self) -> int:
        """Optimizer steps done of the run; Lightning's count begins at 0 in each process."""
        return self.first_step + self.trainer.global_step

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        hidden, _ = self.model.hidden(batch["input_ids"], starts=batch.get("starts"))
        loss = self.model.loss(hidden, batch["targets"], batch["loss_mask"])
        return loss * self.token_mean.weight(self.trainer, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        offload = getattr(self.trainer.strategy, "offload", False)
        return build_optimizer(self.model, self.optim, by_block=self.draw is not None, offload=offload)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.token_mean.begin_batch(self.trainer, batch)
        self.rate = learning_rate(self.step, self.total_steps, self.optim)
        optimizer = self.trainer.optimizers[0]
        if self.draw is not None:
            self.draw.apply(self.model.blocks, optimizer, self.step)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * group["lr_scale"] * group.get("active", 1)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return  # the engine clips, by `gradient_clip_val`
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        limit = gradient_clip_val or float("inf")
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, limit))

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.grad_norm = self.trainer.strategy.deepspeed_engine.get_global_grad_norm()
