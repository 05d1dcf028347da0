"""Bone's two block products: compiled for the CPU (cuda/bone), plain torch operations on other devices.

Blocks are (G, N, r): G groups of N rows, with one r x r matrix per group. They are views: either the column blocks of
rows (N, G*r), see `column_blocks`, or the row blocks of a weight (G*r, I), see `row_blocks`.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from rwkv_peft.ops.build import load_library

logger = logging.getLogger(__name__)

LANES = 16
"""The compiled products require r to be a multiple of this."""

COMPILED_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the compiled products accept for blocks. Matrices and sums are fp32."""


def column_blocks(x: Tensor, r: int) -> Tensor:
    """Return the column blocks of x as a view: (N, G*r) -> (G, N, r)."""
    return x.unflatten(-1, (-1, r)).transpose(0, 1)


def row_blocks(weight: Tensor, r: int) -> Tensor:
    """Return the blocks of each row of blocks, stacked, as a view: (G*r, I) -> (G, r * I/r, r)."""
    return weight.unflatten(0, (-1, r)).flatten(1).unflatten(-1, (-1, r))


def mix_blocks(
    x: Tensor, matrices: Tensor, *, tile: Tensor | None = None, want_sum: bool = False, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return x_g + p_g with the update p_g = (x_g + tile) M_g, and the sum of the updates over the groups.

    Args:
        x: (G, N, r) blocks.
        matrices: (G, r, r), in the dtype of the products.
        tile: (N, r) in the same dtype, added to every block before the product.
        want_sum: whether to return the sum of the updates; otherwise the sum has no rows.
        dtype: dtype of the returned blocks.
    Returns:
        (G, N, r), with x's memory layout if the last dimension of x is contiguous, and (N, r) in the matrices' dtype.
    """
    if dtype in COMPILED_DTYPES and _compiled_fits(matrices.dtype, x):
        return torch.ops.rwkv_peft.mix_blocks(_contiguous_rows(x), matrices.contiguous(), tile, want_sum, dtype)
    wide = x.to(matrices.dtype)
    update = torch.bmm(wide if tile is None else wide + tile, matrices)  # (G, N, r)
    out = torch.empty_like(x, dtype=dtype).copy_(wide + update)
    return out, update.sum(0) if want_sum else update.new_empty((0, update.shape[2]))


def outer_blocks(left: Tensor, right: Tensor, *, tile: Tensor | None = None, dtype: torch.dtype) -> Tensor:
    """Return (left_g + tile)^T right_g, (G, r, r), with products in `dtype`.

    left and right are (G, N, r), tile is (N, r).
    """
    if _compiled_fits(dtype, left, right):
        return torch.ops.rwkv_peft.outer_blocks(_contiguous_rows(left), _contiguous_rows(right), tile)
    left = left.to(dtype) if tile is None else left.to(dtype) + tile
    return torch.bmm(left.mT, right.to(dtype))


def _compiled_fits(product_dtype: torch.dtype, *blocks: Tensor) -> bool:
    if product_dtype != torch.float32 or blocks[0].device.type != "cpu" or blocks[0].shape[-1] % LANES:
        return False
    return all(x.dtype in COMPILED_DTYPES for x in blocks) and _has_compiled()


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.compiler.assume_constant_result  # torch.compile must not trace the build
def _has_compiled() -> bool:
    return _load_compiled()


@functools.cache
def _load_compiled() -> bool:
    """Load the compiled products, and log one warning if that fails."""
    if reason := load_library("bone"):
        logger.warning("bone: using slower torch operations; the compiled ones are not available: %s", reason)
        return False
    torch.library.register_fake("rwkv_peft::mix_blocks", _fake_mix)
    torch.library.register_fake("rwkv_peft::outer_blocks", _fake_outer)
    return True


def _fake_mix(x, matrices, tile, want_sum, dtype):
    return torch.empty_like(x, dtype=dtype), matrices.new_empty((x.shape[1] if want_sum else 0, x.shape[2]))


def _fake_outer(left, right, tile):
    _, _, r = left.shape
    return left.new_empty((left.shape[0], r, r), dtype=torch.float32)
