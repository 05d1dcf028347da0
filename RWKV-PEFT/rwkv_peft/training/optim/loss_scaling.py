"""fp16's loss scaling: small gradients would be 0 in fp16, so the loss is multiplied, and theirs divided again."""

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

from rwkv_peft.training.optim.bad_steps import OVERFLOW, StepGuard, clip_or_skip


class LossScaling(Precision):
    """Scales the loss by torch's GradScaler; casts nothing, as the model does that itself (fp32 masters, fp16 inside).

    The scale halves after a step whose gradient overflowed, and doubles after 2000 without one.

    Args:
        device_type: cuda, or cpu in tests.
    """

    precision = "16-mixed"

    def __init__(self, device_type: str) -> None:
        self.scaler = torch.amp.GradScaler(device_type)
        self._losses_finite: Tensor | None = None  # those of the step's batches, in one bool

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:
        finite = torch.isfinite(tensor.detach())
        self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite
        return super().pre_backward(self.scaler.scale(tensor), module)

    def clip_or_skip(
        self,
        guard: StepGuard,
        named: Sequence[tuple[str, Parameter]],
        limit: float,
        optimizer: Optimizer,
        strategy: Strategy,
    ) -> None:
        """`guard.clip_or_skip` on gradients without the scale, and the next step's scale.

        A gradient that overflowed below a finite loss is the scale's fault; no scale mends a loss that is not finite.
        """
        self.scaler.unscale_(optimizer)

        def overflowed() -> bool:
            bad = strategy.reduce((~self._losses_finite).float(), reduce_op="max")  # of any process
            return not bad and self.scaler.get_scale() > 1

        clip_or_skip(guard, named, limit, overflowed)
        blameless = guard.skipped is not None and guard.skipped != OVERFLOW
        self.scaler.update(self.scaler.get_scale() if blameless else None)
        self._losses_finite = None

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state_dict)
