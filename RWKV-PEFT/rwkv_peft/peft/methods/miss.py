"""MiSS, which later versions of arXiv 2409.15371 call Bone: one r x O matrix, shared by all input blocks.

dW_b = M^T for each block b of r input columns, so y = W x + M^T sum_b x_b. Later RWKV-PEFT calls it bone or disha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.low_rank import miss_linear
from rwkv_peft.peft.base import LayerConfig, Method, PeftLinear, divisors, wide_dtype


@dataclass(frozen=True, kw_only=True)
class MissConfig(LayerConfig):
    """Options of `--peft miss`."""

    name = "miss"


class MissLinear(PeftLinear):
    """y = W x + M^T sum_b x_b; the trainable parameter is `miss`, M (r, O), zero at init."""

    adapter_names = ("miss",)

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, config, dtype)
        self.miss = nn.Parameter(torch.zeros(config.r, self.out_features, device=self.weight.device, dtype=dtype))

    def project(self, x: Tensor) -> Tensor:
        return miss_linear(x, self.weight, self.miss)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.miss.to(weight.dtype).mT.repeat(1, weight.shape[1] // self.config.r)

    def delta_rows(self, ids: Tensor) -> Tensor:
        return self.miss.mT[ids].to(wide_dtype(self.weight)).tile(self.in_features // self.config.r)

    @classmethod
    def check_shape(cls, name: str, shape: tuple[int, int], config: MissConfig) -> None:
        if shape[1] % config.r:
            what = f"does not fit {name}.weight ({shape[0]} x {shape[1]}): {config.r} does not divide {shape[1]}"
            raise ConfigError(config.flag, f"r={config.r}", what=what, hint=f"These r divide it: {divisors(shape[1])}.")


METHOD = Method(config=MissConfig, layer=MissLinear)
