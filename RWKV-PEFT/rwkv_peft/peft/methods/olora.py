"""OLoRA (arXiv 2406.01775): A and B start from the QR decomposition of W, so B's columns are orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.peft.methods.lora import LowRankConfig
from rwkv_peft.peft.residual import DerivedLinear


@dataclass(frozen=True, kw_only=True)
class OloraConfig(LowRankConfig):
    """Options of `--peft olora`."""

    flag = "olora_config"


class OloraLinear(DerivedLinear):
    """B = Q[:, :r] and A = R[:r] of W = Q R; the residual W - B A stays frozen."""

    def factors(self, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return r[: self.config.r], q[:, : self.config.r]
