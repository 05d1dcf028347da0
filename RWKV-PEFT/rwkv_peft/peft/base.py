"""What every PEFT method has in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.products import Matrix


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Options that every method with layers has."""

    flag: ClassVar[str]
    """The flag that errors name."""

    r: int = 64
    """Size of what trains."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another r for the layers whose names match a pattern, as in --peft_targets; the last match counts."""
    load: str = ""
    """Adapter file to start from."""

    def __post_init__(self) -> None:
        for key, r in {"r": self.r, **{f"rank_pattern {name}": r for name, r in self.rank_pattern.items()}}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ConfigError(self.flag, key, found=r, expected="a positive integer")

    def require(self, key: str, good: bool, expected: str) -> None:
        """Raise ConfigError unless the option's value is good."""
        if not good:
            raise ConfigError(self.flag, key, found=getattr(self, key), expected=expected)


class PeftLinear(nn.Module):
    """A frozen linear layer (or embedding) with something small that trains beside it.

    The layer adopts the `weight` (and `bias`) of the layer it replaces, so base names never change; the method's own
    parameters, named in `adapter_names`, sit beside them. An embedding (V, C) is a linear layer whose rows are looked
    up. `hold` may put a quantised matrix in the weight's place, so a method reads it as a `Matrix`: by rows, and
    `weight[:]` for all of them.

    Args:
        base: the layer to replace.
        config: the method's options, with this layer's r.
        dtype: of the trained parameters.
    """

    adapter_names: ClassVar[tuple[str, ...]]
    """Names of the trained parameters."""
    initial_names: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that an adapter file keeps too, since the frozen weight is derived from them."""
    default_targets: ClassVar[tuple[str, ...]] = ("att", "ffn")
    """Patterns of `--peft_targets` where none are given."""
    identity_at_init: ClassVar[bool] = True
    """Whether the layer equals the replaced one before training (up to rounding of the frozen weight)."""
    mergeable: ClassVar[bool] = True
    """Whether the layer is a linear map, so that it can become one matrix."""
    needs_gradient: ClassVar[bool] = False
    """Whether `initialise` wants the weight's gradient."""

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, getattr(base, "bias", None)
        self.config = config
        self.looks_up = isinstance(base, nn.Embedding)
        # Noted, since a weight that ZeRO-3 shared out has lost its shape.
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in x's dtype; an embedding: ids (...) -> rows (..., I) in its dtype, rounded once."""
        if self.looks_up:
            return (self.weight[x].to(wide_dtype(self.weight)) + self.delta_rows(x)).to(self.weight.dtype)
        y = self.project(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in x's dtype, without the bias."""
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """dW, (O, I), for the base's original weight (O, I) in a wide dtype: always a pure delta, differentiable."""
        raise NotImplementedError

    def delta_rows(self, ids: Tensor) -> Tensor:
        """Rows of dW: ids (...) -> (..., I), in fp32 or wider. Methods that have it can go onto an embedding."""
        raise NotImplementedError

    def initialise(self, gradient: Tensor | None = None) -> None:
        """Give the trained parameters their values; `gradient` of the weight, where the method asks for it."""

    def derive_base(self) -> None:
        """Make the frozen weight what the method wants it to be, from the initial factors."""

    def effective_weight(self) -> Tensor:
        """The one matrix that the layer multiplies with, (O, I), in a wide dtype."""
        weight = self.weight[:].to(wide_dtype(self.weight))
        return weight + self.delta_weight(weight)

    @torch.no_grad()
    def merged_weight(self, original: Tensor) -> Tensor:
        """The base's original weight + dW, in a wide dtype; the caller rounds it to what it stores."""
        original = original.to(wide_dtype(original))
        return original + self.delta_weight(original)

    def hold(self, weight: nn.Module) -> None:
        """Hold the frozen weight as a module that is a `Matrix`, a quantised one; `bias` stays as it is."""
        del self.weight  # a parameter's name cannot be given to a module
        self.weight = weight

    @classmethod
    def check_shape(cls, name: str, shape: tuple[int, int], config: Any) -> None:
        """Raise ConfigError where a target's (O, I) cannot carry this method."""

    @classmethod
    def has_rows(cls, config: Any) -> bool:
        """Whether the method, so configured, can go onto an embedding."""
        return cls.delta_rows is not PeftLinear.delta_rows

    def lr_scales(self) -> Mapping[str, float]:
        """Multipliers of the learning rate, of parameters that have one."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.config}"


def wide_dtype(weight: Matrix) -> torch.dtype:
    """fp32, or float64 for a float64 weight: what deltas are computed in."""
    return torch.promote_types(weight.dtype, torch.float32)


def divisors(*sides: int) -> str:
    """The r that divide all sides, for a hint: from 8 up where there are such."""
    common = math.gcd(*sides)
    return ", ".join(str(r) for r in range(1, common + 1) if common % r == 0 and r >= min(8, common))
