"""LoRA (arXiv 2106.09685): the update alpha / r * B A on its own path beside a frozen product.

Letters: N rows (batch x time), O out_features, I in_features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.products import in_own_dtype, product_dtype, times, times_transposed


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y = x W^T + scaling * (x A^T) B^T, rounded once. Backward keeps x, x A^T and the matrices.

    Args:
        x: (..., I), any float dtype.
        weight: (O, I), frozen: it gets no gradient.
        a, b: (r, I) and (O, r).
        scaling: alpha / r.
    Returns:
        (..., O) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _LoraLinear.apply(rows, weight, a, b, scaling, product_dtype(rows))
    return y.reshape(*x.shape[:-1], weight.shape[0])


class _LoraLinear(torch.autograd.Function):
    """`lora_linear` on (N, I) rows, computed in `dtype`."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.scaling, ctx.dtype = scaling, dtype
        wide = x.to(dtype)
        low_rank = wide @ a.to(dtype).mT  # (N, r)
        ctx.save_for_backward(x, weight, a, b, low_rank.to(x.dtype))
        return times_transposed(wide, weight).addmm_(low_rank, b.to(dtype).mT, alpha=scaling).to(x.dtype)

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low_rank = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        grad_y = grad_y.to(ctx.dtype)
        grad_low_rank = grad_y @ b.to(ctx.dtype) * ctx.scaling  # (N, r)
        grad_x = grad_a = grad_b = None
        if wants_x:
            grad_x = times(grad_y, weight).addmm_(grad_low_rank, a.to(ctx.dtype)).to(x.dtype)
        if wants_a:
            grad_a = (grad_low_rank.mT @ x.to(ctx.dtype)).to(a.dtype)
        if wants_b:
            grad_b = (grad_y.mT @ low_rank.to(ctx.dtype) * ctx.scaling).to(b.dtype)
        return grad_x, None, grad_a, grad_b, None, None
