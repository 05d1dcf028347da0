"""Bone's variants (arXiv 2409.15371v1): free grouping of the blocks, and the two ablations of the update.

W is (O, I), cut into r x r blocks W_ab (a: output block, b: input block), as in ops/bone/layouts.py. Its function
`block_affine_delta` also defines these variants:

    group          bone (g, r, r)        dW_ab = W_ab B_i + B_i, i = (a * I/r + b) mod g   (eq. 3, 4)
    unconstrained  bone (2, I/r, r, r)   dW_ab = W_ab A_b + B_b, A = bone[0], B = bone[1]  (eq. 11)
    hadamard       bone (I/r, r, r)      dW_ab = W_ab * B_b + B_b, elementwise             (eq. 12)

`unconstrained`, and `group` if g divides I/r, act on the input and cost as much as LoRA. The others need W + dW. It is
built for one slice of output rows at a time, discarded after use, and built again for backward (the "tiled form"). None
of the three variants keeps a weight-sized tensor, and W can be any object whose rows can be read with `weight[rows]`.

Stochastic rounding, which row, col and left offer, is not available here. Slices of W + dW are computed in fp32 or
wider and rounded once to the dtype of the products. If that dtype is bf16 or fp16 (on a GPU, or a CPU with AMX; see
ops/products.py), updates smaller than half a step of that dtype are lost: those of W in the tiled form, and those of x
otherwise.

Letters: N rows (batch x time), O out_features, I in_features, r block size, g matrices, k row blocks of one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.bone.block_products import column_blocks, mix_blocks, outer_blocks
from rwkv_peft.ops.bone.layouts import bone_row
from rwkv_peft.ops.products import Matrix, in_own_dtype, product_dtype, times, times_transposed, weight_slices

TILE_ELEMENTS = 2**21
"""Number of elements of W + dW that the tiled form builds at a time, 8 MB in fp32. `group` briefly needs four times as
much."""


def bone_group(x: Tensor, weight: Matrix, bone: Tensor) -> Tensor:
    """Return y = x (W + dW)^T with dW_ab = W_ab B_i + B_i: block number i, counted row by row, uses matrix i mod g.

    If g divides I/r, a block's matrix depends on b only. This is the layout row with bone repeated (g = I/r is exactly
    row). Every other g, including multiples of I/r, uses the tiled form, whose cost does not depend on g. (Rows of
    blocks with the same matrices could share x + B x, but they are not adjacent in W, and with many groups this would
    cost more than building W + dW.)

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), any float dtype, frozen (no gradient); r divides O and I (checked at injection).
        bone: (g, r, r), any float dtype; g divides the number of blocks, O/r * I/r.
    Returns:
        (..., O) in x's dtype.
    """
    input_blocks, g = weight.shape[1] // bone.shape[-1], bone.shape[0]
    if input_blocks % g == 0:
        return bone_row(x, weight, bone.repeat(input_blocks // g, 1, 1))  # autograd sums over the copies
    return _on_rows(_Tiled, x, weight, bone, _GROUP)


def bone_unconstrained(x: Tensor, weight: Matrix, bone: Tensor) -> Tensor:
    """Return y = x (W + dW)^T with dW_ab = W_ab A_b + B_b: the factor and the summand of a block are independent.

    The update acts on the input only, as in row:
        y = W (x + A_b x_b) + tile(sum_b B_b x_b)
    Saves only x, W and bone for backward.

    Args and returns as for `bone_group`, but bone is (2, I/r, r, r): A, then B.
    """
    return _on_rows(_BoneUnconstrained, x, weight, bone)


def bone_hadamard(x: Tensor, weight: Matrix, bone: Tensor) -> Tensor:
    """Return y = x (W + dW)^T with dW_ab = W_ab * B_b + B_b elementwise, one r x r matrix per *input* block.

    Always uses the tiled form: one pass over W builds W + dW. Saves only x, W and bone for backward.

    Args and returns as for `bone_group`, but bone is (I/r, r, r).
    """
    return _on_rows(_Tiled, x, weight, bone, _HADAMARD)


def _on_rows(function: type[torch.autograd.Function], x: Tensor, weight: Matrix, bone: Tensor, *options) -> Tensor:
    """Apply an autograd Function for rows (N, I) to x (..., I)."""
    rows = x.reshape(-1, x.shape[-1])
    y = function.apply(rows, weight, bone, product_dtype(rows), *options)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _TiledForm(NamedTuple):
    """How the tiled form computes one variant, for a slice of k row blocks of W that begins at row block `a`."""

    updated: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
    """(W's rows (k*r, I), bone in fp32 or wider, a, dtype) -> the rows of W + dW, (k*r, I) in dtype."""

    add_gradient: Callable[[Tensor, Tensor, Tensor, int], None]
    """(grad_bone, W's rows, gradient of these rows of W + dW, a): adds these rows' part to grad_bone in place."""


class _Tiled(torch.autograd.Function):
    """Computes y = x (W + dW)^T on (N, I) rows, building W + dW in slices, with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, bone: Tensor, dtype: torch.dtype, form: _TiledForm) -> Tensor:
        ctx.save_for_backward(x, bone)
        ctx.weight = weight  # not saved as a tensor: it is frozen, and may be quantized weights
        ctx.dtype, ctx.form, y_dtype = dtype, form, x.dtype
        x, bone = x.to(dtype), bone.to(_at_least_fp32(dtype))
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows in _row_slices(weight, bone):
            mixed = form.updated(weight[rows], bone, rows.start // bone.shape[-1], dtype)  # (k*r, I)
            y[:, rows].addmm_(x, mixed.mT, beta=0)
        return y.to(y_dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        (x_saved, bone_saved), weight, form = ctx.saved_tensors, ctx.weight, ctx.form
        x, grad_y, bone = x_saved.to(ctx.dtype), grad_y.to(ctx.dtype), bone_saved.to(_at_least_fp32(ctx.dtype))
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_bone = torch.zeros_like(bone) if ctx.needs_input_grad[2] else None
        for rows in _row_slices(weight, bone):
            part, grad_part, first = weight[rows], grad_y[:, rows], rows.start // bone.shape[-1]
            if grad_x is not None:
                mixed = form.updated(part, bone, first, ctx.dtype)  # (k*r, I)
                grad_x.addmm_(grad_part, mixed, beta=int(rows.start > 0))
            if grad_bone is not None:
                form.add_gradient(grad_bone, part, grad_part.mT @ x, first)
        return (
            None if grad_x is None else grad_x.to(x_saved.dtype),
            None,
            None if grad_bone is None else grad_bone.to(bone_saved.dtype),
            None,
            None,
        )


def _row_slices(weight: Matrix, bone: Tensor):
    return weight_slices(weight, multiple=bone.shape[-1], elements=TILE_ELEMENTS)


def _group_updated(weight: Tensor, bone: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Return W_ab + (W_ab + unit) B_i."""
    r = bone.shape[-1]
    blocks = _counted_blocks(weight, r)  # (k * I/r, r, r)
    matrices = bone[_matrix_indices(weight, bone, first)]  # (k * I/r, r, r)
    mixed, _ = mix_blocks(blocks, matrices, tile=_unit(bone), dtype=dtype)
    return mixed.view(-1, weight.shape[1] // r, r, r).transpose(1, 2).reshape(weight.shape)


def _group_add_gradient(grad_bone: Tensor, weight: Tensor, grad_weight: Tensor, first: int) -> None:
    """Add these rows' part to the gradient of B_i, the sum of (W_ab + unit)^T dL/dW_ab over the blocks with B_i."""
    blocks, grad_blocks = (_counted_blocks(t, grad_bone.shape[-1]) for t in (weight, grad_weight))
    parts = outer_blocks(blocks, grad_blocks, tile=_unit(grad_bone), dtype=grad_bone.dtype)  # (k * I/r, r, r)
    grad_bone.index_add_(0, _matrix_indices(weight, grad_bone, first), parts)


def _counted_blocks(weight: Tensor, r: int) -> Tensor:
    """Return the blocks in the paper's order, row by row: (k*r, I) -> (k * I/r, r, r). A copy unless k is 1."""
    return weight.unflatten(0, (-1, r)).unflatten(-1, (-1, r)).transpose(1, 2).flatten(0, 1)


def _matrix_indices(weight: Tensor, bone: Tensor, first: int) -> Tensor:
    """Return the matrix index i of every block of a slice of W's rows that begins at row block `first`: (k * I/r,)."""
    g, r, _ = bone.shape
    start, count = first * (weight.shape[1] // r), weight.shape[0] * weight.shape[1] // r**2
    return torch.arange(start, start + count, device=bone.device) % g


def _unit(bone: Tensor) -> Tensor:
    return torch.eye(bone.shape[-1], dtype=bone.dtype, device=bone.device)


def _hadamard_updated(weight: Tensor, bone: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Return W_ab * (1 + B_b) + B_b, which does not depend on the row of blocks."""
    side_by_side = _side_by_side(bone)  # (r, I)
    stacked = weight.to(bone.dtype).unflatten(0, (-1, bone.shape[-1]))  # (k, r, I)
    return torch.addcmul(side_by_side, stacked, 1 + side_by_side).to(dtype).flatten(0, 1)


def _hadamard_add_gradient(grad_bone: Tensor, weight: Tensor, grad_weight: Tensor, first: int) -> None:
    """Add these rows' part to the gradient of B_b, the sum over a of (W_ab + 1) * dL/dW_ab."""
    r = grad_bone.shape[-1]
    stacked, grad = (t.to(grad_bone.dtype).unflatten(0, (-1, r)) for t in (weight, grad_weight))  # (k, r, I)
    grad_bone += column_blocks(torch.addcmul(grad, stacked, grad).sum(0), r)


def _side_by_side(bone: Tensor) -> Tensor:
    """Return the matrices side by side, as in a row of blocks of W: (I/r, r, r) -> (r, I)."""
    return bone.transpose(0, 1).flatten(1)


_GROUP = _TiledForm(_group_updated, _group_add_gradient)
_HADAMARD = _TiledForm(_hadamard_updated, _hadamard_add_gradient)


class _BoneUnconstrained(torch.autograd.Function):
    """Computes `bone_unconstrained` on (N, I) rows with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, bone: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, bone)
        ctx.weight = weight  # as in _Tiled
        ctx.dtype, r = dtype, bone.shape[-1]
        factors, summands = bone.to(dtype)
        mixed, _ = mix_blocks(column_blocks(x, r), factors.mT, dtype=dtype)  # (I/r, N, r)
        tile = x.to(dtype) @ _side_by_side(summands).mT  # (N, r)
        y = times_transposed(mixed.transpose(0, 1).flatten(1), weight)  # (N, O)
        y.unflatten(-1, (-1, r)).add_(tile.unsqueeze(1))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, bone = ctx.saved_tensors  # read only once: checkpointing may not allow a second access
        r, dtype = bone.shape[-1], ctx.dtype
        factors, summands = bone.to(dtype)
        grad_y = grad_y.to(dtype)
        grad_mixed = column_blocks(times(grad_y, ctx.weight), r)  # (I/r, N, r)
        grad_tile = grad_y.unflatten(-1, (-1, r)).sum(1)  # (N, r)
        grad_x = grad_bone = None
        if ctx.needs_input_grad[0]:
            grad_x = mix_blocks(grad_mixed, factors, dtype=dtype)[0].transpose(0, 1).flatten(1)  # (N, I)
            grad_x = grad_x.addmm_(grad_tile, _side_by_side(summands)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad_factors = outer_blocks(grad_mixed, column_blocks(x, r), dtype=dtype)
            grad_summands = column_blocks(grad_tile.mT @ x.to(dtype), r)  # (I/r, r, r)
            grad_bone = torch.stack([grad_factors, grad_summands]).to(bone.dtype)
        return grad_x, None, grad_bone, None
