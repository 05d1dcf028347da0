"""Loss scaling for fp16: the loss is multiplied by a scale so that small gradients do not become 0, and gradients are
divided by it before the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rwkv_peft.training.optim.bad_steps import OVERFLOW, StepGuard


class LossScaling(Precision):
    """Scales the loss with torch's GradScaler. It casts nothing: the model itself casts its fp32 masters to fp16.

    The scale is halved after a step whose gradient overflowed, and doubled after 2000 steps without overflow.

    Args:
        device_type: cuda, or cpu in tests.
    """

    precision = "16-mixed"

    def __init__(self, device_type: str) -> None:
        self.scaler = torch.amp.GradScaler(device_type)
        self._losses_finite: Tensor | None = None  # of the step's micro-batches so far, () bool

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:
        finite = torch.isfinite(tensor.detach())
        self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite
        return super().pre_backward(self.scaler.scale(tensor), module)

    def clip_or_drop(
        self,
        guard: StepGuard,
        named: Sequence[tuple[str, Parameter]],
        max_norm: float,
        optimizer: Optimizer,
        strategy: Strategy,
    ) -> bool:
        """`StepGuard.clip_or_drop` on unscaled gradients; also updates the scale for the next step.

        An infinite gradient of a finite loss means that the scale was too high. If the loss itself is not finite, no
        scale helps.
        """
        self.scaler.unscale_(optimizer)

        def overflowed() -> bool:
            any_bad = strategy.reduce((~self._losses_finite).float(), reduce_op="max")  # over all processes
            return not any_bad and self.scaler.get_scale() > 1

        allowed = guard.clip_or_drop(named, max_norm, overflowed)
        keep_scale = not allowed and guard.skipped != OVERFLOW
        self.scaler.update(self.scaler.get_scale() if keep_scale else None)
        self._losses_finite = None
        return allowed

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state_dict)
