"""DoRA (arXiv 2402.09353): LoRA on the direction of the weight's rows, and a trainable length for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.ops.low_rank import low_rank_row_norms
from rwkv_peft.peft.base import Method, wide_dtype
from rwkv_peft.peft.methods.lora import LoraConfig, LoraLinear


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """Options of `--peft dora`."""

    name = "dora"


class DoraLinear(LoraLinear):
    """y = m / |V| * V x with V = W + s B A, where |V| is the length of each row and has no gradient.

    The trainable parameters are `lora_A`, `lora_B` and `lora_magnitude`, m (O,), which is |W| at init.
    """

    adapter_names = ("lora_A", "lora_B", "lora_magnitude")

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, config, dtype)
        self.lora_magnitude = nn.Parameter(torch.zeros(self.out_features, device=self.weight.device, dtype=dtype))

    def initialize(self, gradient: Tensor | None = None) -> None:
        super().initialize()
        with torch.no_grad():
            self.lora_magnitude.copy_(self._lengths())

    def project(self, x: Tensor) -> Tensor:
        scale = self.lora_magnitude.to(wide_dtype(self.weight)) / self._lengths()  # (O,)
        return (super().project(x) * scale).to(x.dtype)

    def delta_weight(self, weight: Tensor) -> Tensor:
        direction = weight + self.low_rank_weight(weight.dtype)
        lengths = direction.detach().norm(dim=1)
        return (self.lora_magnitude.to(weight.dtype) / lengths)[:, None] * direction - weight

    def delta_rows(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids].to(wide_dtype(self.weight))
        direction = rows + super().delta_rows(ids)
        scale = self.lora_magnitude[ids].to(rows.dtype) / direction.detach().norm(dim=-1)
        return scale[..., None] * direction - rows

    def _lengths(self) -> Tensor:
        return low_rank_row_norms(self.weight, self.lora_A.detach(), self.lora_B.detach(), self.config.scaling)


METHOD = Method(config=DoraConfig, layer=DoraLinear)
