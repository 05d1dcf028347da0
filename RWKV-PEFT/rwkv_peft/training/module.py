"""One training step, as Lightning wants it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.evaluation.loss import summed
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.infctx import sliced_loss
from rwkv_peft.training.optim.bad_steps import StepGuard, clip_or_skip, guard_engine, keep_honest
from rwkv_peft.training.optim.lisa import BlockDraw
from rwkv_peft.training.optim.loss_scaling import LossScaling
from rwkv_peft.training.optim.normalisation import TokenMean
from rwkv_peft.training.optim.optimizer import build_optimizer
from rwkv_peft.training.optim.schedule import learning_rate


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
        self.guard = StepGuard(optim)
        """Knows the last step's gradient norm, and whether it was skipped."""
        self.token_mean = TokenMean()
        self.chunk, self.full_bptt = 0, True
        """How rows are sliced: see `sliced_loss`."""
        self.first_step = 0
        """Optimizer steps that earlier processes made of this run."""

    @property
    def step(self) -> int:
        """Optimizer steps done of the run; Lightning's count begins at 0 in each process."""
        return self.first_step + self.trainer.global_step

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed loss and number of trained tokens, (2,) float64, for a validation."""
        return summed(sliced_loss(self.model, batch, self.chunk), batch["loss_mask"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = sliced_loss(self.model, batch, self.chunk, self.full_bptt)
        return keep_honest(loss * self.token_mean.weight(self.trainer, batch))

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

    def on_train_start(self) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            guard_engine(self.trainer.strategy.deepspeed_engine.optimizer, self.guard)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return  # the engine clips, by `gradient_clip_val`
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        scaling = self.trainer.precision_plugin
        if isinstance(scaling, LossScaling):
            scaling.clip_or_skip(self.guard, trained, gradient_clip_val or 0.0, optimizer, self.trainer.strategy)
        else:
            clip_or_skip(self.guard, trained, gradient_clip_val or 0.0)
