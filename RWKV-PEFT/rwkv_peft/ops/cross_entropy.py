"""The training loss: cross-entropy over the tokens in the loss, with RWKV-LM's L2Wrap.

`masked_cross_entropy` is the definition. The other two functions also apply the model's head. With 65,536 logits per
token, the logits and their gradient would be the largest tensors of a training step by far. These functions compute
logits for a few rows at a time and skip rows that are not in the loss. They compute the gradients in the forward pass,
while the logits exist.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rwkv_peft.ops.products import in_own_dtype, product_dtype, times, times_transposed

L2WRAP = 1e-4
"""L2Wrap's factor: RWKV-LM adds this times the largest logit of each token to that logit's gradient."""

CHUNK_LOGITS = 2**25
"""Number of logits that exist at the same time: 128 MB in fp32, 512 rows with the World vocabulary."""

HEAD_ROWS = 512
"""Number of rows that pass through a head with an adapter at the same time."""


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy over the tokens selected by `mask`, computed in fp32 or wider.

    The gradient includes RWKV-LM's L2Wrap: 1e-4 times the largest logit of each token, averaged over the tokens in the
    loss, which moves that logit towards 0. The value of the loss does not include it.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64.
        mask: (B, T) bool; the loss is 0 if no token is selected.
    Returns:
        A scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (B*T,)
    pull = 0.5 * L2WRAP * logits.amax(-1).flatten().square()  # its gradient is 1e-4 x the largest logit
    weight = mask.flatten().to(loss.dtype)
    return ((loss + pull - pull.detach()) * weight).sum() / weight.sum().clamp(min=1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return `masked_cross_entropy(hidden @ weight.T, targets, mask)` without storing the logits of all tokens.

    Products use hidden's dtype or a wider one (ops/products.py). Softmax, log-sum-exp and the loss use fp32 or wider.
    There is no second derivative.

    Args:
        hidden: (B, T, C), the head's input.
        weight: (V, C), the head's weight; may be wider than hidden (fp32 master weights).
        targets: (B, T) int64.
        mask: (B, T) bool, True for targets in the loss; the loss is 0 if there are none.
    Returns:
        A scalar, in fp32 or wider.
    """
    rows = hidden.flatten(0, 1)
    options = (product_dtype(rows), torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(rows, weight, targets.flatten(), mask.flatten(), *options)


def head_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, mask: Tensor) -> Tensor:
    """Return the same loss for a head that is not a single matrix, such as one with an adapter.

    The logits also exist for a few rows at a time only, and the backward pass computes them again.

    Args and returns as for `linear_cross_entropy`, with head: (R, C) -> (R, V).
    """
    rows = mask.flatten().nonzero().squeeze(1)  # (R,)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    share = 1 / max(1, len(rows))

    def part_loss(part: Tensor, part_targets: Tensor, share: float) -> Tensor:
        return _RowsCrossEntropy.apply(head(part), part_targets, share)

    loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for part in _parts(rows, len(hidden)):
        part_share = share
        if not len(part):  # call the head all the same: under ZeRO-3 the other processes may call it now
            part, part_share = torch.zeros_like(targets[:1]), 0.0
        loss = loss + checkpoint(part_loss, hidden[part], targets[part], part_share, use_reentrant=False)
    return loss


def _parts(rows: Tensor, total: int) -> tuple[Tensor, ...]:
    """Split `rows`, the indices of the rows in the loss, at every multiple of HEAD_ROWS.

    The number of parts depends on the total number of rows only. It is therefore the same on all processes, which must
    call the head equally often if ZeRO-3 has sharded it.
    """
    edges = HEAD_ROWS * torch.arange(1, -(-total // HEAD_ROWS), device=rows.device)
    return torch.tensor_split(rows, torch.searchsorted(rows, edges).cpu())


class _RowsCrossEntropy(torch.autograd.Function):
    """Computes `share` times the summed loss of logits (R, V)."""

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
    """Computes `linear_cross_entropy` on N rows with products in `dtype`; R of the rows are in the loss."""

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
    """Return the factor of the gradient that is applied in the backward pass instead of the forward pass.

    In fp16, a gradient times one row's share of the mean would underflow. The loss scale compensates for this, but only
    the backward pass knows it.
    """
    return share if dtype == torch.float16 and share else 1.0


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad times a scalar in grad's dtype; the scalar may be outside fp16's range."""
    if grad.dtype == torch.float16:
        return (grad.float() * factor).half()
    return grad * factor  # PyTorch does not round a scalar tensor to grad's dtype before the product


def _loss_and_gradient(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return `share` times the summed loss of some rows, and its gradient including L2Wrap.

    The gradient overwrites the logits (chunk, V), which are in fp32 or wider; targets are (chunk,).
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
