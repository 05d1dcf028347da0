"""LoRA-GA (arXiv 2407.05000): A and B start along the singular vectors of the weight's gradient on real batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.peft.methods.lora import LoraConfig
from rwkv_peft.peft.residual import DerivedLinear


@dataclass(frozen=True, kw_only=True)
class LoraGaConfig(LoraConfig):
    """Options of `--peft lora_ga`."""

    flag = "lora_ga_config"
    rslora: bool = True
    """Scale by alpha / sqrt(r), as the paper does; false: alpha / r."""
    gamma: float = 16.0
    """The larger, the smaller the first factors: they are divided by its root."""
    samples: int = 32
    """Samples that the gradient is estimated on, the run's first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("gamma", 0 < self.gamma < math.inf, "a positive number")
        self.require("samples", self.samples >= 1, "an integer of at least 1")


class LoraGaLinear(DerivedLinear):
    """With G = U S V^T: A = c V[:, :r]^T and B = c U[:, r:2r], c = O^(1/4) / sqrt(gamma); W - s B A stays frozen."""

    needs_gradient = True
    rank_needed = 2

    def factors(self, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        if gradient is None:
            raise ValueError("lora_ga starts from the weights' gradients: give inject() gradients by layer name")
        r = self.config.r
        u, _, v = torch.svd_lowrank(gradient.to(weight), q=min(4 * r, *weight.shape), niter=4)
        scale = weight.shape[0] ** 0.25 / self.config.gamma**0.5
        return scale * v[:, :r].mT, scale * u[:, r : 2 * r]
