"""Adapter layers (Houlsby et al., arXiv 1902.00751): a small network after the projections to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.ops.products import linear
from rwkv_peft.peft.base import LayerConfig, Method, PeftLinear


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LayerConfig):
    """Options of `--peft adapter`."""

    name = "adapter"
    mergeable = False


class AdapterLinear(PeftLinear):
    """y = h + U gelu(D h + d) + u with h = W x and U zero at init. It is not linear, so it cannot be merged.

    The trainable parameters are `adapter_down` D (r, O), `adapter_down_bias` d (r,), `adapter_up` U (O, r) and
    `adapter_up_bias` u (O,).
    """

    adapter_names = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")
    default_targets = ("att.output", "ffn.value")

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, config, dtype)
        like = {"device": self.weight.device, "dtype": dtype}
        self.adapter_down = nn.Parameter(torch.zeros(config.r, self.out_features, **like))
        self.adapter_down_bias = nn.Parameter(torch.zeros(config.r, **like))
        self.adapter_up = nn.Parameter(torch.zeros(self.out_features, config.r, **like))
        self.adapter_up_bias = nn.Parameter(torch.zeros(self.out_features, **like))

    def initialize(self, gradient: Tensor | None = None) -> None:
        nn.init.kaiming_uniform_(self.adapter_down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)  # (..., O)
        inner = F.gelu(linear(h, self.adapter_down) + self.adapter_down_bias.to(h.dtype))  # (..., r)
        return h + linear(inner, self.adapter_up) + self.adapter_up_bias.to(h.dtype)

    def project(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


METHOD = Method(config=AdapterConfig, layer=AdapterLinear)
