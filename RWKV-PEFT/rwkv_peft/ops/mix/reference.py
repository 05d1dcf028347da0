"""Definitions of the functions of `ops/mix/op.py` in plain torch, for any device, any dtype and any derivative.

Parameters may have a wider dtype than the activations. Results have the activations' dtype. `ops/mix/op.py` documents
the arguments and shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_shift(x: Tensor, last: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return each token's predecessor, (B, T, C).

    The first token's predecessor is `last` (B, C). Tokens with `starts` (B, T) set have a predecessor of zeros.
    """
    previous = torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    return previous if starts is None else previous.masked_fill(starts.unsqueeze(-1), 0)


def ddlerp(
    x: Tensor, last: Tensor, maa_x: Tensor, w1: Tensor, maa: Tensor, w2: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, ...]:
    dtype = x.dtype
    delta = token_shift(x, last, starts) - x
    low_rank = torch.tanh((x + delta * maa_x.to(dtype)) @ w1.to(dtype))
    low_rank = low_rank.unflatten(-1, (5, -1)).movedim(-2, 0).flatten(1, 2)  # (5, B*T, R)
    amounts = torch.bmm(low_rank, w2.to(dtype)).unflatten(1, x.shape[:2])  # (5, B, T, C)
    return tuple(x + delta * (base + amount) for base, amount in zip(maa.to(dtype), amounts, strict=True))


def shift_lerp(x: Tensor, last: Tensor, maa: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    delta = token_shift(x, last, starts) - x
    first, second = maa.to(x.dtype)
    return x + delta * first, x + delta * second


def decay(x: Tensor, base: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    low_rank = torch.tanh(x @ w1.to(x.dtype)) @ w2.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return base.to(wide) + low_rank.to(wide)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    normal = F.group_norm(y.flatten(0, 1), groups, weight.to(y.dtype), bias.to(y.dtype), eps)  # (B*T, A)
    return normal.view(y.shape) * F.silu(gate)


def relu_square(k: Tensor) -> Tensor:
    return torch.relu(k).square()
