"""LoRA (arXiv 2106.09685): dW = alpha / r * B A, with B zero at init."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.low_rank import lora_linear
from rwkv_peft.ops.products import linear
from rwkv_peft.peft.base import PeftLinear, wide_dtype


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Options of `--peft lora`."""

    r: int = 32
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of A."""
    load: str = ""
    """Adapter file to start from."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError("lora_config", "r", found=self.r, expected="a positive integer")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora_config", "dropout", found=self.dropout, expected="a number in [0, 1)")


class LoraLinear(PeftLinear):
    """y = W x + alpha / r * B A x; the trained parameters are `lora_A` (r, I) and `lora_B` (O, r)."""

    adapter_names = ("lora_A", "lora_B")

    def __init__(self, linear: nn.Linear, config: LoraConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(linear, config)
        out_features, in_features = self.weight.shape
        like = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        return self.config.alpha / self.config.r

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.config.dropout:
            low_rank = linear(F.dropout(x, self.config.dropout), self.lora_A)  # (..., r)
            y = linear(x, self.weight) + self.scaling * linear(low_rank, self.lora_B)
        else:
            y = lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def delta_weight(self) -> Tensor:
        wide = wide_dtype(self.weight)
        return self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))
