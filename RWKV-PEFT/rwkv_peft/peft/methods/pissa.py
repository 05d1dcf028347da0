"""PiSSA (arXiv 2404.02948): A and B start from the principal singular vectors of W, on a frozen residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.peft.base import Method
from rwkv_peft.peft.methods.lora import LowRankConfig
from rwkv_peft.peft.residual import ResidualLoraLinear


@dataclass(frozen=True, kw_only=True)
class PissaConfig(LowRankConfig):
    """Options of `--peft pissa`."""

    name = "pissa"

    svd_niter: int = 4
    """Power iterations of the fast (randomized) SVD; 0: exact SVD, which takes minutes for a large model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("svd_niter", self.svd_niter >= 0, "an integer of at least 0")


class PissaLinear(ResidualLoraLinear):
    """A = sqrt(S) V^T and B = U sqrt(S) for the r largest singular values."""

    def factors(self, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        r = self.config.r
        if self.config.svd_niter:
            u, s, v = torch.svd_lowrank(weight, q=min(2 * r, *weight.shape), niter=self.config.svd_niter)
            vt = v.mT
        else:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        root = s[:r].sqrt()
        return root[:, None] * vt[:r], u[:, :r] * root


METHOD = Method(config=PissaConfig, layer=PissaLinear)
