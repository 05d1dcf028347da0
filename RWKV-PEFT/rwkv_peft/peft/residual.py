"""LoRA on a residual: A and B start from factors of the weight, and the frozen weight is the residual W - s B0 A0.

The residual is never stored. The adapter file stores the initial factors B0 and A0, from which it is computed again
with the original base. So dW = s (B A - B0 A0) is a pure delta of the original base, and merges like any other.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.base import wide_dtype
from rwkv_peft.peft.methods.lora import LoraLinear


class ResidualLoraLinear(LoraLinear):
    """LoRA's forward pass on the residual weight; `init_lora_A` and `init_lora_B` are the initial factors."""

    initial_names = ("init_lora_A", "init_lora_B")
    rank_needed: ClassVar[int] = 1
    """Number of singular vectors that the initial factors use, in multiples of r."""

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, config, dtype)
        for factor in self.adapter_names:
            self.register_buffer(f"init_{factor}", torch.zeros_like(getattr(self, factor), requires_grad=False))

    def factors(self, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the initial A (r, I) and B (O, r) of a weight (O, I), in a wide dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, gradient: Tensor | None = None) -> None:
        a, b = self.factors(self.weight.to(wide_dtype(self.weight)), gradient)
        for trained, initial, value in ((self.lora_A, self.init_lora_A, a), (self.lora_B, self.init_lora_B, b)):
            trained.copy_(value)
            initial.copy_(trained)

    @torch.no_grad()
    def derive_base(self) -> None:
        wide = wide_dtype(self.weight)
        # A new parameter, because the old one may be tied to another layer or mapped from the base's file.
        residual = (self.weight.to(wide) - self._initial_weight(wide)).to(self.weight.dtype)
        self.weight = nn.Parameter(residual, requires_grad=False)

    def _initial_weight(self, dtype: torch.dtype) -> Tensor:
        return self.config.scaling * (self.init_lora_B.to(dtype) @ self.init_lora_A.to(dtype))

    def delta_weight(self, weight: Tensor) -> Tensor:
        return self.low_rank_weight(weight.dtype) - self._initial_weight(weight.dtype)

    def effective_weight(self) -> Tensor:
        return self.weight[:].to(wide_dtype(self.weight)) + self.low_rank_weight(wide_dtype(self.weight))

    @classmethod
    def check_shape(cls, name: str, shape: tuple[int, int], config: Any) -> None:
        largest = min(shape) // cls.rank_needed
        if config.r > largest:
            what = f"is too large for {name}.weight ({shape[0]} x {shape[1]})"
            raise ConfigError(config.flag, f"r={config.r}", what=what, expected=f"at most {largest}")
