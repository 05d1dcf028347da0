"""Bone (Block Affine, arXiv 2409.15371): r x r matrices, each shared by a group of the weight's blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.bone.layouts import block_affine_delta, bone_col, bone_left, bone_materialized, bone_row
from rwkv_peft.ops.bone.variants import bone_group, bone_hadamard, bone_unconstrained
from rwkv_peft.peft.base import LayerConfig, PeftLinear, divisors, wide_dtype

ROUNDED = {"row": bone_row, "col": bone_col, "left": bone_left}
"""Modes that can round stochastically."""
PLAIN = {"group": bone_group, "unconstrained": bone_unconstrained, "hadamard": bone_hadamard}
MODES = (*ROUNDED, *PLAIN)


@dataclass(frozen=True, kw_only=True)
class BoneConfig(LayerConfig):
    """Options of `--peft bone`."""

    flag = "bone_config"
    mode: str = "row"
    """Which blocks share a matrix, and how it acts: row, col, left, group, or the paper's ablations unconstrained and
    hadamard (see docs/methods.md)."""
    g: int = 0
    """With mode group: the number of matrices. It divides the number of blocks of every target."""
    rounding: str = "nearest"
    """nearest, or stochastic: where products are in bf16, small updates then arrive in the mean."""
    impl: str = "fused"
    """fused, or materialized: dW is built as in the paper's code, for comparison (also --bone_impl)."""
    cp: int = 0
    """1: the materialized form is computed again in the backward pass, not kept (also --bone_cp)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            hint = "Hugging Face's bat is col; RWKV-PEFT's bone_mode bat is row." if self.mode == "bat" else None
            raise ConfigError(self.flag, "mode", found=self.mode, expected=" | ".join(MODES), hint=hint)
        self.require("g", self.g >= 0 and (self.g > 0) == (self.mode == "group"), "a positive integer with mode group")
        rounds = self.mode in ROUNDED
        self.require("rounding", self.rounding in ("nearest", "stochastic")[: 1 + rounds], "nearest | stochastic")
        self.require("impl", self.impl in ("fused", "materialized"), "fused | materialized")
        self.require("cp", self.cp in (0, 1), "0 | 1")

    def bone_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Of the trained parameter of a layer."""
        r = self.r
        if self.mode == "unconstrained":
            return 2, in_features // r, r, r
        blocks = {"row": in_features // r, "hadamard": in_features // r, "group": self.g}
        return blocks.get(self.mode, out_features // r), r, r


class BoneLinear(PeftLinear):
    """y = (W + W bone + bone) x, blockwise; the trained parameter is `bone`, of r x r matrices."""

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
        # While training only: evaluated twice, the same input must give the same output.
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
    def has_rows(cls, config: BoneConfig) -> bool:
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
