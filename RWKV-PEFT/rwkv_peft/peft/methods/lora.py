"""LoRA (arXiv 2106.09685): dW = s B A with s = alpha / r, and B zero at init.

Options: rank-stabilized scaling, s = alpha / sqrt(r) (arXiv 2312.03732), and LoRA+'s larger learning rate for B
(arXiv 2402.12354).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.ops.low_rank import lora_linear
from rwkv_peft.ops.products import linear
from rwkv_peft.peft.base import LayerConfig, Method, PeftLinear, wide_dtype


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(LayerConfig):
    """Options of every method with trainable factors A and B."""

    r: int = 32
    """Rank of the update."""
    dropout: float = 0.0
    """Dropout on the input of A."""
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B relative to A; the paper uses 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("dropout", 0 <= self.dropout < 1, "a number in [0, 1)")
        self.require("lr_ratio", 0 < self.lr_ratio < math.inf, "a positive number")

    @property
    def scaling(self) -> float:
        """The factor s in dW = s B A."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LowRankConfig):
    """Options of `--peft lora`."""

    name = "lora"
    meaning = (*LowRankConfig.meaning, "alpha", "rslora")

    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("alpha", 0 < self.alpha < math.inf, "a positive number")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoraLinear(PeftLinear):
    """y = W x + s B A x; the trainable parameters are `lora_A` (r, I) and `lora_B` (O, r)."""

    adapter_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, config, dtype)
        out_features, in_features = self.weight.shape
        like = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.zeros(config.r, in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, **like))

    def initialize(self, gradient: Tensor | None = None) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def project(self, x: Tensor) -> Tensor:
        scaling = self.config.scaling
        if self.training and self.config.dropout:
            low_rank = linear(F.dropout(x, self.config.dropout), self.lora_A)  # (..., r)
            return linear(x, self.weight) + scaling * linear(low_rank, self.lora_B)
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, scaling)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.low_rank_weight(weight.dtype)

    def delta_rows(self, ids: Tensor) -> Tensor:
        wide = wide_dtype(self.weight)
        return self.config.scaling * (self.lora_B[ids].to(wide) @ self.lora_A.to(wide))

    def low_rank_weight(self, dtype: torch.dtype) -> Tensor:
        """Return s B A, (O, I)."""
        return self.config.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def lr_scales(self) -> Mapping[str, float]:
        return {"lora_B": self.config.lr_ratio}


METHOD = Method(config=LoraConfig, layer=LoraLinear)
