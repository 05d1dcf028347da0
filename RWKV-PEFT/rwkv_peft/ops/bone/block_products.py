"""Bone's two block products, compiled for the CPU (cuda/bone) and in plain torch operations everywhere else.

Blocks are (G, N, r): G groups of N rows, one r x r matrix a group. They are views: the column blocks of rows (N, G*r)
(`column_blocks`), or the row blocks of a weight (G*r, I) (`row_blocks`).
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from rwkv_peft.ops.build import load_library

logger = logging.getLogger(__name__)

LANES = 16
"""The compiled products want r to be a multiple of this."""

COMPILED_DTYPES = (torch.float32, torch.bfloat16)
"""Of blocks; matrices and sums are fp32."""


def column_blocks(x: Tensor, r: int) -> Tensor:
    """(N, G*r) -> (G, N, r), a view."""
    return x.unflatten(-1, (-1, r)).transpose(0, 1)


def row_blocks(weight: Tensor, r: int) -> Tensor:
    """(G*r, I) -> (G, r * I/r, r): the blocks of each row of blocks, stacked; a view."""
    return weight.unflatten(0, (-1, r)).flatten(1).unflatten(-1, (-1, r))


def mix_blocks(
    x: Tensor, matrices: Tensor, *, tile: Tensor | None = None, want_sum: bool = False, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x_g + p_g with the update p_g = (x_g + tile) M_g, and the sum of the updates over the groups.

    Args:
        x: (G, N, r) blocks.
        matrices: (G, r, r), in the dtype that products are in.
        tile: (N, r) in that dtype, joins every block.
        want_sum: or the sum has no rows.
        dtype: of the mixed blocks.
    Returns:
        (G, N, r), laid out in memory as x is where its rows are whole, and (N, r) in the matrices' dtype.
    """
    if dtype in COMPILED_DTYPES and _compiled_fits(matrices.dtype, x):
        return torch.ops.rwkv_peft.mix_blocks(_with_whole_rows(x), matrices.contiguous(), tile, want_sum, dtype)
    wide = x.to(matrices.dtype)
    update = torch.bmm(wide if tile is None else wide + tile, matrices)  # (G, N, r)
    out = torch.empty_like(x, dtype=dtype).copy_(wide + update)
    return out, update.sum(0) if want_sum else update.new_empty((0, update.shape[2]))


def outer_blocks(left: Tensor, right: Tensor, *, tile: Tensor | None = None, dtype: torch.dtype) -> Tensor:
    """(left_g + tile)^T right_g, summed over the rows: (G, N, r) twice and (N, r) -> (G, r, r), products in `dtype`."""
    if _compiled_fits(dtype, left, right):
        return torch.ops.rwkv_peft.outer_blocks(_with_whole_rows(left), _with_whole_rows(right), tile)
    left = left.to(dtype) if tile is None else left.to(dtype) + tile
    return torch.bmm(left.mT, right.to(dtype))


def _compiled_fits(product_dtype: torch.dtype, *blocks: Tensor) -> bool:
    if product_dtype != torch.float32 or blocks[0].device.type != "cpu" or blocks[0].shape[-1] % LANES:
        return False
    return all(x.dtype in COMPILED_DTYPES for x in blocks) and _has_compiled()


def _with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.compiler.assume_constant_result  # torch.compile must not look into the building of a library
def _has_compiled() -> bool:
    return _load_compiled()


@functools.cache
def _load_compiled() -> bool:
    """Build or find the compiled products; says once where they cannot be had."""
    if reason := load_library("bone"):
        logger.warning("bone: the slower torch operations, as the compiled ones are missing: %s", reason)
        return False
    torch.library.register_fake("rwkv_peft::mix_blocks", _fake_mix)
    torch.library.register_fake("rwkv_peft::outer_blocks", _fake_outer)
    return True


def _fake_mix(x, matrices, tile, want_sum, dtype):
    return torch.empty_like(x, dtype=dtype), matrices.new_empty((x.shape[1] if want_sum else 0, x.shape[2]))


def _fake_outer(left, right, tile):
    _, _, r = left.shape
    return left.new_empty((left.shape[0], r, r), dtype=torch.float32)
