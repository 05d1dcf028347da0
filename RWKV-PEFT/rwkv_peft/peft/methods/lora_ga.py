"""LoRA-GA (arXiv 2407.05000): A and B start from singular vectors of the weight's gradient on training samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.peft.base import Method
from rwkv_peft.peft.methods.lora import LoraConfig
from rwkv_peft.peft.residual import ResidualLoraLinear


@dataclass(frozen=True, kw_only=True)
class LoraGaConfig(LoraConfig):
    """Options of `--peft lora_ga`."""

    name = "lora_ga"
    meaning = (*LoraConfig.meaning, "gamma")

    rslora: bool = True
    """true: scale by alpha / sqrt(r), as in the paper; false: by alpha / r."""
    gamma: float = 16.0
    """The initial factors are divided by its square root."""
    samples: int = 32
    """Number of samples for the gradient; the run's first samples are used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("gamma", 0 < self.gamma < math.inf, "a positive number")
        self.require("samples", self.samples >= 1, "an integer of at least 1")

    @property
    def gradient_samples(self) -> int:
        return self.samples


class LoraGaLinear(ResidualLoraLinear):
    """With G = U S V^T: A = c V[:, :r]^T, B = c U[:, r:2r], c = O^(1/4) / sqrt(gamma), on the residual W - s B A."""

    rank_needed = 2

    def factors(self, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        if gradient is None:
            raise ValueError("lora_ga starts from gradients of the weights: pass gradients by layer name to inject()")
        r = self.config.r
        u, _, v = torch.svd_lowrank(gradient.to(weight), q=min(4 * r, *weight.shape), niter=4)
        scale = weight.shape[0] ** 0.25 / self.config.gamma**0.5
        return scale * v[:, :r].mT, scale * u[:, r : 2 * r]


METHOD = Method(config=LoraGaConfig, layer=LoraGaLinear)
