"""DeepSpeed's ZeRO as a Lightning strategy, also on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.devices import UNSHARDED_BELOW


class KeepDtypes(DeepSpeedPrecision):
    """Leaves every parameter in its dtype. Lightning's plugin would widen a frozen bf16 base to fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy for training steps that run their own micro-batches.

    Args:
        stage: of ZeRO, 1 to 3.
        offload: keep the optimizer's state on the CPU and update there.
        micro_batches: in one optimizer step; the last step of an epoch may have fewer.
        grad_clip: maximum global gradient norm; 0 turns clipping off.
    """

    def __init__(self, stage: int, *, offload: bool, micro_batches: int, grad_clip: float) -> None:
        super().__init__(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
        self.offload, self.micro_batches = offload, micro_batches
        self.config["gradient_clipping"] = grad_clip
        self.config["train_micro_batch_size_per_gpu"] = 1  # only its throughput log uses it
        if stage == 3:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = UNSHARDED_BELOW

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed  # not at the top: it takes seconds, and most runs do not need it

        # DeepSpeed would compile this operator for 40 seconds; only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Lightning refuses CPUs here, although the engine runs on them. It addresses devices by index.
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)

    def _format_batch_size_and_grad_accum_config(self) -> None:
        super()._format_batch_size_and_grad_accum_config()
        # To Lightning one batch is one optimizer step; the engine allocates buffers for accumulation only if it knows.
        self.config["gradient_accumulation_steps"] = self.micro_batches

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Optimizer | None, *args: Any) -> Any:
        if self.zero_stage_3:
            import deepspeed

            # Shards one parameter at a time. The engine would first move the whole model to every device.
            deepspeed.zero.Init(module=model, config_dict_or_path=self.config)
            model.to(self.root_device)  # the buffers
        return super()._setup_model_and_optimizer(model, optimizer, *args)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module directly: its step calls the engine itself, once for each micro-batch."""
        return self.lightning_module.training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # The step has weighted the loss already; the engine would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def gradient_sync(self, is_last: bool) -> AbstractContextManager:
        """Tell the engine whether a step's last micro-batch follows."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def judge_steps(self, allows: Callable[[float], bool]) -> None:
        """Let `allows(norm)` decide on every optimizer step, by its global gradient norm; all processes see the same.

        DeepSpeed's ZeRO optimizers compute the norm inside their step. They skip the update if it is not finite, so a
        refused norm is replaced by infinity.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        optimizer: Any = self.deepspeed_engine.optimizer

        def verdict(norm: Tensor) -> Tensor:
            return norm if allows(float(norm)) else torch.full_like(norm, math.inf)

        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
            optimizer.check_grad_overflow = True  # with bf16 parameters it is off, and no norm would be checked
            optimizer.check_overflow = lambda **_: None  # its own check adds nothing to that of the norm
            global_norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *args: verdict(global_norm(*args))
        else:
            norms = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [verdict(combine_grad_norm_groups(norms()))]
