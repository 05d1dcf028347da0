"""One optimizer step, from top to bottom.

To Lightning one batch is one optimizer step: a list of micro-batches (data/datamodule.py). So gradient accumulation,
an epoch's shorter last step, the loss scale and the step count are all in `TrainingModule.training_step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.distributed.deepspeed_strategy import DeepSpeed
from rwkv_peft.training.distributed.strategy import gradient_sync
from rwkv_peft.training.optim.bad_steps import StepGuard, spread_nonfinite
from rwkv_peft.training.optim.lisa import BlockFreezer
from rwkv_peft.training.optim.loss_scaling import LossScaling
from rwkv_peft.training.optim.optimizer import build_optimizer
from rwkv_peft.training.optim.schedule import learning_rate
from rwkv_peft.training.sliced_loss import sliced_loss

MicroBatch = dict[str, Tensor]
"""input_ids, targets (B, T) int64; loss_mask (B, T) bool; sample (B, 2) int64, each row's (epoch, index); for packed
rows starts (B, T) bool."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all micro-batches and processes."""

    loss: float
    """Mean over the step's tokens in the loss, in nats."""
    lr: float
    """Learning rate before the multipliers of parameter groups."""
    tokens: int
    """Tokens in the loss."""
    grad_norm: float
    """Global gradient norm before clipping."""
    skipped: str | None
    """Reason why the update was skipped; None if it was made."""


class TrainingModule(pl.LightningModule):
    """The model with its optimizer; a training step is one optimizer step.

    Args:
        model: with adapters in place and trainable parameters marked.
        config: resolved.
        total_steps: optimizer steps of the whole run, for the schedule.
        first_step: optimizer steps of this run done before it was resumed.
    """

    def __init__(self, model: RWKV6, config: RunConfig, total_steps: int, first_step: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.optim, self.total_steps = model, config.optim, total_steps
        self.slice_tokens = config.train.slice_tokens
        self.full_bptt = config.train.infctx_bptt == "full"
        self.block_freezer = BlockFreezer(config) if config.peft.method.changes_active_blocks else None
        self.guard = StepGuard(config.optim)
        self.step = first_step
        """Optimizer steps of the run so far, including skipped ones."""
        self.result: StepResult | None = None
        """Result of the last step."""

    def training_step(self, micro_batches: list[MicroBatch], batch_idx: int) -> None:
        """Make one optimizer step.

        Args:
            micro_batches: of this process; an epoch's last step may have fewer than --accumulate_grad_batches.
        """
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        rate = learning_rate(self.step, self.total_steps, self.optim)
        self._set_learning_rate(rate)

        # The loss of a step is one mean over all its tokens, no matter how they are spread over micro-batches and
        # processes. Each micro-batch therefore counts by its share of these tokens.
        counts = torch.stack([batch["loss_mask"].sum() for batch in micro_batches])
        own_counts, tokens = _with_sum_over_processes(counts, strategy)
        losses = []
        for number, (batch, count) in enumerate(zip(micro_batches, own_counts, strict=True), start=1):
            with gradient_sync(strategy, is_last=number == len(micro_batches)):
                loss = strategy.model(batch) * self._weight(count, tokens)
                # Multiplying, then dividing, by accumulate_grad_batches is redundant, but it keeps the rounding of
                # earlier versions, so their runs resume bit for bit.
                loss = spread_nonfinite(loss) / self.optim.accumulate_grad_batches
                self.manual_backward(loss)
            losses.append(loss.detach().float())

        if isinstance(strategy, DeepSpeed):
            optimizer.step()  # the engine checks the norm, clips, and updates (`judge_steps`)
        elif self._clip_or_drop(optimizer):
            optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        # The weights contain the world size, so the mean over processes is the sum of their shares.
        mean_loss = strategy.reduce(torch.stack(losses).sum(), reduce_op="mean")
        self.result = StepResult(float(mean_loss), rate, tokens, self.guard.norm, self.guard.skipped)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Mean loss of a micro-batch over its tokens in the loss, a scalar; 0 if it has none."""
        return sliced_loss(self.model, batch, self.slice_tokens, self.full_bptt)

    def _weight(self, count: int, tokens: int) -> float:
        """Weight of a micro-batch's mean loss, relative to the average micro-batch of the step.

        Gradients are averaged over processes, and the loss is divided by --accumulate_grad_batches.

        Args:
            count: tokens in the micro-batch's loss.
            tokens: tokens in the loss of the whole step, over all processes.
        """
        return count / max(1, tokens) * (self.trainer.world_size * self.optim.accumulate_grad_batches)

    def _set_learning_rate(self, rate: float) -> None:
        optimizer = self.trainer.optimizers[0]
        if self.block_freezer is not None:
            self.block_freezer.apply(self.model.blocks, optimizer, self.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] * group.get("active", 1)

    def _clip_or_drop(self, optimizer: torch.optim.Optimizer) -> bool:
        """Clip the gradients and return True, or drop them and return False if the step must not be made."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        scaling = self.trainer.precision_plugin
        if isinstance(scaling, LossScaling):
            raw, strategy = self.trainer.optimizers[0], self.trainer.strategy
            return scaling.clip_or_drop(self.guard, named, self.optim.grad_clip, raw, strategy)
        return self.guard.clip_or_drop(named, self.optim.grad_clip)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        offload = getattr(self.trainer.strategy, "offload", False)
        return build_optimizer(self.model, self.optim, by_block=self.block_freezer is not None, offload=offload)

    def on_train_start(self) -> None:
        if isinstance(self.trainer.strategy, DeepSpeed):
            self.trainer.strategy.judge_steps(self.guard.allows)


def _with_sum_over_processes(counts: Tensor, strategy: pl.strategies.Strategy) -> tuple[list[int], int]:
    """Return `counts` as integers, and their sum over all processes. One transfer from the device."""
    total = strategy.reduce(counts.sum(), reduce_op="sum")
    *own, total = torch.cat((counts, total.view(1))).tolist()
    return own, int(total)
