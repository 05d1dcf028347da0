"""`--strategy` as arguments of Lightning's Trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor

from rwkv_peft.config.sections import OptimConfig, TrainConfig
from rwkv_peft.devices import world_size
from rwkv_peft.training.distributed.deepspeed_strategy import DeepSpeed, KeepDtypes
from rwkv_peft.training.distributed.launch import DeepSpeedEnvironment
from rwkv_peft.training.distributed.versions import check_versions


class Ddp(DDPStrategy):
    """Lightning's DDPStrategy for training steps that run their own micro-batches."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module directly: its step calls DDP itself, once for each micro-batch."""
        return self.lightning_module.training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """DDP has prepared its reducer in its forward; Lightning would prepare it a second time."""

    def gradient_sync(self, is_last: bool) -> AbstractContextManager:
        """Average gradients over processes only in a step's last micro-batch, when they are complete."""
        return nullcontext() if is_last else self.model.no_sync()


def gradient_sync(strategy: Strategy, is_last: bool) -> AbstractContextManager:
    """Return a context for forward and backward of one micro-batch: gradients are exchanged after the last one."""
    return strategy.gradient_sync(is_last) if isinstance(strategy, Ddp | DeepSpeed) else nullcontext()


def build_strategy(
    train: TrainConfig, optim: OptimConfig, *, precision: Precision | None = None, find_unused: bool = False
) -> dict[str, Any]:
    """Return the Trainer's arguments for `--strategy`.

    Args:
        train: device and strategy flags.
        optim: accumulation and clipping, which DeepSpeed does itself.
        precision: a plugin that scales the loss, for strategies other than DeepSpeed.
        find_unused: some trainable parameters get no gradient in some steps, which DDP has to look for.
    Raises:
        UserError: a version of Lightning or DeepSpeed that this code was not tested with.
    """
    check_versions("pytorch-lightning", *(["deepspeed"] if train.zero_stage else []))
    environment = [DeepSpeedEnvironment()] if DeepSpeedEnvironment.detect() else []
    if train.zero_stage:
        strategy = DeepSpeed(
            train.zero_stage,
            offload=train.offloads,
            micro_batches=optim.accumulate_grad_batches,
            grad_clip=optim.grad_clip,
        )
        return {"strategy": strategy, "plugins": [KeepDtypes(), *environment]}
    plugins = [*environment, *([precision] if precision else [])]
    if train.strategy == "auto" and world_size(train) == 1:
        return {"strategy": "auto", "plugins": plugins}
    # Buffers, including a quantized base, never change: sending them around in every step would be waste.
    return {"strategy": Ddp(forward_sync_buffers=False, find_unused_parameters=find_unused), "plugins": plugins}
