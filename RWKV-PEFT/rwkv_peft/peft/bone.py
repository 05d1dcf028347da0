"""Bone (Block Affine, arXiv 2409.15371): one zero-initialised r x r matrix per row or column of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.block_affine import block_affine_delta, bone_col, bone_left, bone_materialized, bone_row
from rwkv_peft.peft.base import PeftLinear, wide_dtype

FORWARD = {"row": bone_row, "col": bone_col, "left": bone_left}


@dataclass(frozen=True, kw_only=True)
class BoneConfig:
    """Options of `--peft bone`."""

    r: int = 64
    """Block size; the trained matrices are r x r."""
    mode: str = "row"
    """Which blocks share a matrix: row, col or left (see ops/block_affine.py)."""
    rounding: str = "nearest"
    """nearest, or stochastic: where products are in bf16, small updates then arrive in the mean."""
    impl: str = "fused"
    """fused, or materialized: dW is built as in the paper's code, for comparison (also --bone_impl)."""
    cp: int = 0
    """1: the materialized form is computed again in the backward pass, not kept (also --bone_cp)."""
    load: str = ""
    """Adapter file to start from."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError("bone_config", "r", found=self.r, expected="a positive integer")
        if self.mode not in FORWARD:
            hint = "Hugging Face's bat is col; RWKV-PEFT's bone_mode bat is row." if self.mode == "bat" else None
            raise ConfigError("bone_config", "mode", found=self.mode, expected=" | ".join(FORWARD), hint=hint)
        if self.rounding not in ("nearest", "stochastic"):
            raise ConfigError("bone_config", "rounding", found=self.rounding, expected="nearest | stochastic")
        if self.impl not in ("fused", "materialized"):
            raise ConfigError("bone_config", "impl", found=self.impl, expected="fused | materialized")
        if self.cp not in (0, 1):
            raise ConfigError("bone_config", "cp", found=self.cp, expected="0 | 1")

    @staticmethod
    def older_spellings(options: dict[str, Any]) -> dict[str, Any]:
        """Later RWKV-PEFT: `"bone_mode":"bat"` is row; its `"bone"` is another method (MiSS)."""
        if options.get("bone_mode") == "bat":
            return options | {"bone_mode": "row"}
        if options.get("bone_mode") == "bone":
            raise ConfigError(
                "bone_config",
                "bone_mode",
                what='"bone" is the later method miss (MiSS, DiSHA), which is not here yet',
                expected=" | ".join(FORWARD),
            )
        return options


class BoneLinear(PeftLinear):
    """y = (W + W bone + bone) x, blockwise; the trained parameter is `bone`, (I/r, r, r) or (O/r, r, r)."""

    adapter_names = ("bone",)

    def __init__(self, linear: nn.Linear, config: BoneConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(linear, config)
        out_features, in_features = self.weight.shape
        blocks = (in_features if config.mode == "row" else out_features) // config.r
        self.bone = nn.Parameter(torch.zeros(blocks, config.r, config.r, device=self.weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self._materialized(x) if self.config.impl == "materialized" else self._fused(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _fused(self, x: Tensor) -> Tensor:
        # While training only: evaluated twice, the same input must give the same output.
        stochastic = self.config.rounding == "stochastic" and self.training
        return FORWARD[self.config.mode](x, self.weight, self.bone, stochastic)

    def _materialized(self, x: Tensor) -> Tensor:
        arguments = (x, self.weight, self.bone, self.config.mode)
        if self.config.cp and torch.is_grad_enabled():
            return checkpoint(bone_materialized, *arguments, use_reentrant=False)
        return bone_materialized(*arguments)

    def delta_weight(self) -> Tensor:
        wide = wide_dtype(self.weight)
        return block_affine_delta(self.weight.to(wide), self.bone.to(wide), self.config.mode)

    @classmethod
    def check_shapes(cls, shapes: Mapping[str, tuple[int, int]], config: BoneConfig) -> None:
        common = math.gcd(*(side for shape in shapes.values() for side in shape))
        fitting = [str(r) for r in range(1, common + 1) if common % r == 0 and r >= min(8, common)]
        for name, (rows, columns) in shapes.items():
            for side in (rows, columns):
                if side % config.r:
                    raise ConfigError(
                        "bone_config",
                        f"r={config.r}",
                        what=f"does not fit {name}.weight ({rows} x {columns}): {config.r} does not divide {side}",
                        hint=f"These r divide every target: {', '.join(fitting)}.",
                    )
