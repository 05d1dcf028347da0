"""OLoRA (arXiv 2406.01775): A and B start from the QR decomposition of W, so B's columns are orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.peft.base import Method
from rwkv_peft.peft.methods.lora import LowRankConfig
from rwkv_peft.peft.residual import ResidualLoraLinear


@dataclass(frozen=True, kw_only=True)
class OloraConfig(LowRankConfig):
    """Options of `--peft olora`."""

    name = "olora"


class OloraLinear(ResidualLoraLinear):
    """B = Q[:, :r] and A = R[:r] of W = Q R, on the frozen residual W - B A."""

    def factors(self, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return r[: self.config.r], q[:, : self.config.r]


METHOD = Method(config=OloraConfig, layer=OloraLinear)
