"""Base classes for PEFT methods: options, layer, and `Method`, which combines both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkv_peft.config.method import MethodConfig
from rwkv_peft.ops.products import Matrix


@dataclass(frozen=True)
class Method:
    """A PEFT method: its options, and either a layer or a function that adds parameters.

    A method with neither trains the base model itself.

    Each module of `peft/methods/`, and each module that `--peft my_package.my_method` names, has one as `METHOD`.
    """

    config: type[MethodConfig]
    layer: type[PeftLinear] | None = None
    """Replaces the targeted layers."""
    add: Callable[..., None] | None = None
    """Adds parameters to the model: `add(model, config, dtype, initialize)`."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig(MethodConfig):
    """Base class for the options of methods that replace layers."""

    mergeable = True
    meaning = ("r", "rank_pattern")

    r: int = 64
    """Size of the trained matrices: block size or rank."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another r for the layers whose names match a pattern, as in --peft_targets; the last match counts."""
    load: str = ""
    """Adapter file to start from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", self.r >= 1, "a positive integer")
        for name, r in self.rank_pattern.items():
            if r < 1:
                raise self.error(f"rank_pattern {name}", found=r, expected="a positive integer")


class PeftLinear(nn.Module):
    """A frozen linear layer (or embedding) with a small trainable adapter.

    The layer adopts the `weight` (and `bias`) of the layer it replaces, so base names never change. The method's own
    parameters, listed in `adapter_names`, are next to them. An embedding (V, C) is a linear layer whose rows are looked
    up. `replace_weight` may store the weight as a quantized matrix, so a method reads it as a `Matrix`: by rows, and
    `weight[:]` for all of them.

    Args:
        base: the layer to replace.
        config: the method's options, with this layer's r.
        dtype: dtype of the trainable parameters.
    """

    adapter_names: ClassVar[tuple[str, ...]]
    """Names of the trainable parameters."""
    initial_names: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that the adapter file also stores, because the frozen weight is derived from them."""
    default_targets: ClassVar[tuple[str, ...]] = ("att", "ffn")
    """Patterns that are used if `--peft_targets` is not given."""
    identity_at_init: ClassVar[bool] = True
    """Whether the layer equals the replaced one before training (up to rounding of the frozen weight)."""

    def __init__(self, base: nn.Linear | nn.Embedding, config: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, getattr(base, "bias", None)
        self.config = config
        self.is_embedding = isinstance(base, nn.Embedding)
        # Stored, because a weight that ZeRO-3 has sharded no longer has its shape.
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in x's dtype.

        An embedding maps ids (...) to rows (..., I) of W + dW. The sum is computed in a wide dtype and rounded once.
        """
        if self.is_embedding:
            return (self.weight[x].to(wide_dtype(self.weight)) + self.delta_rows(x)).to(self.weight.dtype)
        y = self.project(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in x's dtype, without the bias."""
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return dW (O, I) for the base's original weight (O, I), in a wide dtype.

        The result does not include the weight. Gradients flow through it.
        """
        raise NotImplementedError

    def delta_rows(self, ids: Tensor) -> Tensor:
        """Return rows of dW, ids (...) -> (..., I), in fp32 or wider. Methods that define it support embeddings."""
        raise NotImplementedError

    def initialize(self, gradient: Tensor | None = None) -> None:
        """Set the initial values of the trainable parameters.

        Args:
            gradient: (O, I), gradient of the loss with respect to the weight; only for methods with
                `gradient_samples` > 0.
        """

    def derive_base(self) -> None:
        """Replace the frozen weight by the residual that the initial factors leave, if the method uses one."""

    def effective_weight(self) -> Tensor:
        """Return the one matrix (O, I) that the layer multiplies with, in a wide dtype."""
        weight = self.weight[:].to(wide_dtype(self.weight))
        return weight + self.delta_weight(weight)

    @torch.no_grad()
    def merged_weight(self, original: Tensor) -> Tensor:
        """Return the base's original weight + dW, (O, I), in a wide dtype; the caller rounds it."""
        original = original.to(wide_dtype(original))
        return original + self.delta_weight(original)

    def replace_weight(self, weight: nn.Module) -> None:
        """Replace the frozen weight by a module that is a `Matrix`, such as `QuantizedWeight`; keep the bias."""
        del self.weight  # a module cannot take the name of an existing parameter
        self.weight = weight

    @classmethod
    def check_shape(cls, name: str, shape: tuple[int, int], config: Any) -> None:
        """Raise ConfigError if the method does not fit a target's shape (O, I)."""

    @classmethod
    def supports_embedding(cls, config: Any) -> bool:
        """Return whether the method supports embeddings with these options."""
        return cls.delta_rows is not PeftLinear.delta_rows

    def lr_scales(self) -> Mapping[str, float]:
        """Return multipliers of the learning rate by parameter name; parameters without one are absent."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.config}"


def wide_dtype(weight: Matrix) -> torch.dtype:
    """Return the dtype that deltas are computed in: fp32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def divisors(*sides: int) -> str:
    """Return the values of r that divide all sides, for a hint.

    Values below 8 are left out; if the largest value is below 8, only this one is returned.
    """
    common = math.gcd(*sides)
    return ", ".join(str(r) for r in range(1, common + 1) if common % r == 0 and r >= min(8, common))
