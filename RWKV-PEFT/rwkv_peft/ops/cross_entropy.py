"""The training loss with the head inside it: cross-entropy over the trained tokens, and RWKV-LM's L2Wrap.

With 65,536 logits a token, logits and their gradient are by far the largest tensors of a step. Here they exist for
a few rows at a time, rows that do not train are left out, and the gradients are made in the forward pass, while the
logits are there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rwkv_peft.ops.products import in_own_dtype, product_dtype, times, times_transposed
from rwkv_peft.ops.wkv6.reference import L2WRAP

CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 128 MB in fp32, 512 rows of the World vocabulary."""


HEAD_ROWS = 512
"""Rows that go through a head with an adapter at a time."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """`reference.masked_cross_entropy(hidden @ weight.T, targets, mask)`, without the logits of all tokens.

    Products are in hidden's dtype or wider (ops/products.py), softmax, log-sum-exp and the loss in fp32 or wider. Twice
    differentiable it is not.

    Args:
        hidden: (B, T, C), the head's input.
        weight: (V, C), the head's; may be wider than hidden (fp32 master weights).
        targets: (B, T) int64.
        mask: (B, T) bool, True where the target trains; no trained token at all gives 0.
    Returns:
        A scalar, in fp32 or wider.
    """
    rows = hidden.flatten(0, 1)
    options = (product_dtype(rows), torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(rows, weight, targets.flatten(), mask.flatten(), *options)


def head_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, mask: Tensor) -> Tensor:
    """The same loss through a head that is more than a matrix, one that carries an adapter.

    Its logits exist for a few rows at a time as well, and are computed again in the backward pass.

    Args and returns as `linear_cross_entropy`, with head: (R, C) -> (R, V).
    """
    rows = mask.flatten().nonzero().squeeze(1)  # (R,)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    share = 1 / max(1, len(rows))

    def part_loss(part: Tensor, part_targets: Tensor, share: float) -> Tensor:
        return _RowsCrossEntropy.apply(head(part), part_targets, share)

    loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for part in _parts(rows, len(hidden)):
        counts = share
        if not len(part):
            part, counts = torch.zeros_like(targets[:1]), 0.0
        loss = loss + checkpoint(part_loss, hidden[part], targets[part], counts, use_reentrant=False)
    return loss


def _parts(rows: Tensor, total: int) -> tuple[Tensor, ...]:
    """The rows that train, by stretches of HEAD_ROWS of all rows: as many on every process, which call the head
    together where ZeRO-3 has shared it out."""
    edges = HEAD_ROWS * torch.arange(1, -(-total // HEAD_ROWS), device=rows.device)
    return torch.tensor_split(rows, torch.searchsorted(rows, edges).cpu())


class _RowsCrossEntropy(torch.autograd.Function):
    """`share` x the summed loss of the rows of some logits (R, V)."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, share: float) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        ctx.late = _late_share(share, logits.dtype)
        loss, grad = _loss_and_gradient(wide, targets, share / ctx.late)
        ctx.save_for_backward(grad.to(logits.dtype))
        return ctx.late * loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return _scaled(grad, ctx.late * grad_loss), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """On N rows, with products in `dtype`; R of them train."""

    @staticmethod
    @in_own_dtype
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, dtype: torch.dtype, grad_enabled: bool
    ) -> Tensor:
        rows = mask.nonzero().squeeze(1)  # (R,)
        share = 1 / max(1, len(rows))
        ctx.late = _late_share(share, hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        wants_hidden, wants_weight = (wanted and grad_enabled for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None  # (N, C)
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None  # (V, C)
        for part in rows.split(max(1, CHUNK_LOGITS // weight.shape[0])):
            x = hidden[part].to(dtype)  # (chunk, C)
            logits = times_transposed(x, weight).to(wide)  # (chunk, V)
            part_loss, grad = _loss_and_gradient(logits, targets[part], share / ctx.late)
            loss += ctx.late * part_loss
            if wants_hidden:
                grad_hidden[part] = times(grad.to(dtype), weight).to(hidden.dtype)
            if wants_weight:
                grad_weight.addmm_(grad.mT, x.to(wide))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_loss = ctx.late * grad_loss
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_loss)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _late_share(share: float, dtype: torch.dtype) -> float:
    """The factor of a gradient that waits for the backward pass.

    One row's share of a gradient is too small for fp16. The loss scale makes up for it, but comes in the backward pass.
    """
    return share if dtype == torch.float16 and share else 1.0


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad x factor, a scalar that may be beyond fp16's numbers, in grad's dtype."""
    if grad.dtype == torch.float16:
        return (grad.float() * factor).half()
    return grad * factor  # a scalar stays as wide as it is in a product


def _loss_and_gradient(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`share` x the summed loss of some rows, and its gradient, L2Wrap's included, which takes the logits' place.

    logits (chunk, V) in fp32 or wider, targets (chunk,).
    """
    chosen = targets.unsqueeze(1)  # (chunk, 1)
    chosen_logit = logits.gather(1, chosen)
    largest, where = logits.max(1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(1, keepdim=True)
    loss = share * (total.log() + largest - chosen_logit).sum()
    grad = exponentials.mul_(share / total)  # share x softmax
    grad.scatter_add_(1, chosen, torch.full_like(total, -share))
    grad.scatter_add_(1, where, share * L2WRAP * largest)
    return loss, grad
