"""What every PEFT method has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class PeftLinear(nn.Module):
    """A frozen linear layer with something small that trains beside it.

    The layer adopts the `weight` (and `bias`) parameter of the layer it replaces, so base names never change;
    the method's own parameters, named in `adapter_names`, sit beside them.
    """

    adapter_names: ClassVar[tuple[str, ...]]
    """Names of the trained parameters."""
    identity_at_init: ClassVar[bool] = True
    """Whether the layer equals the replaced one before training."""

    def __init__(self, linear: nn.Linear, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in x's dtype."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """dW, (O, I), computed in fp32 (or the weight's dtype where that is wider): always a pure delta."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + dW in the dtype of `delta_weight`; the caller rounds it to what it stores."""
        delta = self.delta_weight()
        return self.weight.to(delta.dtype) + delta

    @classmethod
    def check_shapes(cls, shapes: Mapping[str, tuple[int, int]], config: Any) -> None:
        """Raise ConfigError where a target's (O, I) cannot carry this method. `shapes` is by qualified name."""

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, {self.config}"


def wide_dtype(weight: Tensor) -> torch.dtype:
    """fp32, or float64 for a float64 weight: what deltas are computed in."""
    return torch.promote_types(weight.dtype, torch.float32)
