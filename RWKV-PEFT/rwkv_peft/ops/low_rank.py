"""Frozen linear layers with a separate low-rank update: LoRA (arXiv 2106.09685) and MiSS.

Letters: N rows (batch x time), O out_features, I in_features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.products import Matrix, in_own_dtype, product_dtype, times, times_transposed, weight_slices


def lora_linear(x: Tensor, weight: Matrix, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return y = x W^T + scaling * (x A^T) B^T, rounded once. Saves x, x A^T and the matrices for backward.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), frozen (no gradient).
        a, b: (r, I) and (O, r).
        scaling: alpha / r.
    Returns:
        (..., O) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _LoraLinear.apply(rows, weight, a, b, scaling, product_dtype(rows))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def miss_linear(x: Tensor, weight: Matrix, d: Tensor) -> Tensor:
    """Return y = x W^T + s D, rounded once, where s = sum_b x_b is the sum of x's blocks of r columns.

    Saves s for backward instead of x.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), frozen (no gradient); r divides I.
        d: (r, O).
    Returns:
        (..., O) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _MissLinear.apply(rows, weight, d, product_dtype(rows)).reshape(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def low_rank_row_norms(weight: Matrix, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the L2 norm of each row of W + scaling B A, (O,), in fp32 or wider.

    The sum is built for one slice of rows at a time. weight is (O, I), a (r, I), b (O, r).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    norms = [
        torch.addmm(weight[rows].to(wide), b[rows], a, alpha=scaling).norm(dim=1) for rows in weight_slices(weight)
    ]
    return torch.cat(norms)


class _LoraLinear(torch.autograd.Function):
    """Computes `lora_linear` on (N, I) rows with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.scaling, ctx.dtype, ctx.weight = scaling, dtype, weight
        wide = x.to(dtype)
        low_rank = wide @ a.to(dtype).mT  # (N, r)
        ctx.save_for_backward(x, a, b, low_rank.to(x.dtype))
        return times_transposed(wide, weight).addmm_(low_rank, b.to(dtype).mT, alpha=scaling).to(x.dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low_rank = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        grad_y = grad_y.to(ctx.dtype)
        grad_low_rank = grad_y @ b.to(ctx.dtype) * ctx.scaling  # (N, r)
        grad_x = grad_a = grad_b = None
        if wants_x:
            grad_x = times(grad_y, ctx.weight).addmm_(grad_low_rank, a.to(ctx.dtype)).to(x.dtype)
        if wants_a:
            grad_a = (grad_low_rank.mT @ x.to(ctx.dtype)).to(a.dtype)
        if wants_b:
            grad_b = (grad_y.mT @ low_rank.to(ctx.dtype) * ctx.scaling).to(b.dtype)
        return grad_x, None, grad_a, grad_b, None, None


class _MissLinear(torch.autograd.Function):
    """Computes `miss_linear` on (N, I) rows with products in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Matrix, d: Tensor, dtype: torch.dtype) -> Tensor:
        wide = x.to(dtype)
        s = wide.unflatten(-1, (-1, d.shape[0])).sum(1)  # (N, r)
        ctx.dtype, ctx.x_dtype, ctx.weight = dtype, x.dtype, weight
        ctx.save_for_backward(s, d)
        return times_transposed(wide, weight).addmm_(s, d.to(dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        s, d = ctx.saved_tensors
        grad_y, grad_x, grad_d = grad_y.to(ctx.dtype), None, None
        if ctx.needs_input_grad[0]:
            grad_x = times(grad_y, ctx.weight)
            grad_x.unflatten(-1, (-1, d.shape[0])).add_((grad_y @ d.to(ctx.dtype).mT).unsqueeze(1))
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_d = (s.mT @ grad_y).to(d.dtype)
        return grad_x, None, grad_d, None
