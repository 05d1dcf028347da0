"""Bone (Block Affine, arXiv 2409.15371v1): r x r matrices, each shared by a group of the weight's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.bone.layouts import block_affine_delta, bone_col, bone_left, bone_materialized, bone_row
from rwkv_peft.ops.bone.variants import bone_group, bone_hadamard, bone_unconstrained
from rwkv_peft.peft.base import LayerConfig, Method, PeftLinear, divisors, wide_dtype

ROUNDED = {"row": bone_row, "col": bone_col, "left": bone_left}
"""Modes that support stochastic rounding."""
PLAIN = {"group": bone_group, "unconstrained": bone_unconstrained, "hadamard": bone_hadamard}
"""Modes that do not."""


@dataclass(frozen=True, kw_only=True)
class BoneConfig(LayerConfig):
    """Options of `--peft bone`."""

    name = "bone"
    meaning = (*LayerConfig.meaning, "mode", "g")

    mode: Literal["row", "col", "left", "group", "unconstrained", "hadamard"] = "row"
    """Which blocks share a matrix: row, col, left, group, or the paper's ablations unconstrained and hadamard (see
    docs/methods.md)."""
    g: int = 0
    """With mode group: the number of matrices. It must divide the number of blocks of every target."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """nearest, or stochastic: with products in bf16, updates too small for bf16 are preserved on average."""
    impl: Literal["fused", "materialized"] = "fused"
    """fused, or materialized: build W + dW as the paper's code does, for comparison (also --bone_impl)."""
    cp: Literal[0, 1] = 0
    """With materialized, 1: build W + dW again in the backward pass instead of keeping it (also --bone_cp)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("g", self.g >= 0 and (self.g > 0) == (self.mode == "group"), "a positive integer with mode group")
        if self.rounding == "stochastic" and self.mode not in ROUNDED:
            expected = f"nearest, or mode {' | '.join(ROUNDED)}"
            raise self.error("rounding", found=f"stochastic with mode {self.mode}", expected=expected)

    def bone_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape of a layer's trainable parameter."""
        r = self.r
        if self.mode == "unconstrained":
            return 2, in_features // r, r, r
        blocks = {"row": in_features // r, "hadamard": in_features // r, "group": self.g}
        return blocks.get(self.mode, out_features // r), r, r


class BoneLinear(PeftLinear):
    """y = (W + dW) x with dW of r x r blocks; `BoneConfig.bone_shape` is the shape of the trainable `bone`."""

    adapter_names = ("bone",)

    def __init__(self, base: nn.Linear | nn.Embedding, config: BoneConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(base, config, dtype)
        self.bone = nn.Parameter(
            torch.zeros(config.bone_shape(*self.weight.shape), device=self.weight.device, dtype=dtype)
        )

    def project(self, x: Tensor) -> Tensor:
        if self.config.impl == "materialized":
            return self._materialized(x)
        mode = self.config.mode
        if mode in PLAIN:
            return PLAIN[mode](x, self.weight, self.bone)
        # In training only: in evaluation, the same input must give the same output.
        stochastic = self.config.rounding == "stochastic" and self.training
        return ROUNDED[mode](x, self.weight, self.bone, stochastic)

    def _materialized(self, x: Tensor) -> Tensor:
        arguments = (x, self.weight, self.bone, self.config.mode)
        if self.config.cp and torch.is_grad_enabled():
            return checkpoint(bone_materialized, *arguments, use_reentrant=False)
        return bone_materialized(*arguments)

    def delta_weight(self, weight: Tensor) -> Tensor:
        return block_affine_delta(weight, self.bone.to(weight.dtype), self.config.mode)

    def delta_rows(self, ids: Tensor) -> Tensor:
        r, wide = self.config.r, wide_dtype(self.weight)
        blocks = self.weight[ids].to(wide).unflatten(-1, (-1, r))  # (..., I/r, r)
        bone, row = self.bone.to(wide), ids % r
        if self.config.mode == "row":
            delta = torch.einsum("...bj,bjc->...bc", blocks, bone) + bone[:, row].movedim(0, -2)
        else:
            matrices = bone[ids // r]  # (..., r, r)
            delta = blocks @ matrices + matrices.take_along_dim(row[..., None, None], -2)
        return delta.flatten(-2)

    @classmethod
    def supports_embedding(cls, config: BoneConfig) -> bool:
        return config.mode in ("row", "col")

    @classmethod
    def check_shape(cls, name: str, shape: tuple[int, int], config: BoneConfig) -> None:
        rows, columns = shape
        for side in shape:
            if side % config.r:
                what = f"does not fit {name}.weight ({rows} x {columns}): {config.r} does not divide {side}"
                hint = f"These r divide both: {divisors(*shape)}."
                raise ConfigError(config.flag, f"r={config.r}", what=what, hint=hint)
        blocks = (rows // config.r) * (columns // config.r)
        if config.g and blocks % config.g:
            what = f"does not divide the {blocks} blocks of {name}.weight ({rows} x {columns})"
            raise ConfigError(config.flag, f"g={config.g}", what=what)


METHOD = Method(config=BoneConfig, layer=BoneLinear)
