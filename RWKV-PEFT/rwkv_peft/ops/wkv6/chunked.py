"""WKV6 in plain PyTorch, one chunk of tokens at a time: the fallback if the compiled operator is not available.

B batch, H heads, c tokens in a chunk, N head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8
"""Number of tokens in a chunk. The decays between all pairs of tokens are (c, c, N), so work and memory per token grow
with c. Below 8, the overhead of many small products is larger. Measured on a CPU, forward and backward: 8 is 1.6 times
faster than 16."""

_W_MAX = 7.0
"""Largest w that is used. exp(-exp(7)) and its gradient are 0 even in float64, so a larger w gives the same result."""


def wkv6_chunked(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.wkv6_reference` with matrix products, for any finite w.

    The logarithm of a product of decays is the sum of their logarithms -exp(w). Only sums over the tokens between two
    positions are exponentiated. They are never positive, and never the difference of two long sums, whose rounding
    error would grow with w.

    Args:
        r, k, v, w: (B, T, H, N), float32 or float64, one dtype.
        u: (H, N). state: (B, H, N, N), indexed [key][value].
    Returns:
        y (B, T, H, N) and the last state (B, H, N, N). Differentiable by autograd, which saves c*c*N elements per
        chunk and head.
    """
    log_decay = -torch.exp(w.clamp(max=_W_MAX))
    outputs = []
    for chunk in zip(*(x.transpose(1, 2).split(CHUNK, dim=2) for x in (r, k, v, log_decay)), strict=True):
        y, state = _one_chunk(*chunk, u, state)
        outputs.append(y)
    return torch.cat(outputs, dim=2).transpose(1, 2), state  # (B, T, H, N)


def _one_chunk(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return y (B, H, c, N) and the next state; r, k, v, log_decay are (B, H, c, N)."""
    since_start = log_decay.cumsum(2)  # (B, H, c, N), token t included
    to_end = log_decay.flip(2).cumsum(2).flip(2)  # token t included

    weights = _pair_weights(log_decay, u)  # (B, H, c, c, N)
    scores = ((weights * k[:, :, None]) @ r[..., None]).squeeze(-1)  # (B, H, c, c), [t][s]
    y = scores @ v + (r * _before(since_start).exp()) @ state

    k_at_end = k * _after(to_end).exp()
    state = since_start[:, :, -1, :, None].exp() * state + k_at_end.transpose(2, 3) @ v
    return y, state


def _pair_weights(log_decay: Tensor, u: Tensor) -> Tensor:
    """Return the weight of the pair (k_s, v_s) in token t for each key channel: (B, H, c, c, N), [t][s].

    The weight is the product of the decays of s+1 .. t-1 if s < t, the bonus u if s = t, and 0 if s > t.
    """
    c = log_decay.shape[2]
    earlier = torch.ones(c, c, dtype=torch.bool, device=log_decay.device).tril(-1)[..., None]  # s < t
    diagonal = torch.eye(c, dtype=torch.bool, device=log_decay.device)[..., None]
    between = torch.where(earlier, log_decay[:, :, :, None], 0.0).cumsum(2)  # sum over s+1 .. t
    weights = torch.where(earlier, _before(between).exp(), 0.0)
    return torch.where(diagonal, u[:, None, None, :], weights)


def _before(sums: Tensor) -> Tensor:
    """Shift running sums over dim 2 so that token t is excluded: the sum up to t - 1."""
    return torch.cat((torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]), dim=2)


def _after(sums: Tensor) -> Tensor:
    """Shift reversed running sums over dim 2 so that token t is excluded: the sum from t + 1."""
    return torch.cat((sums[:, :, 1:], torch.zeros_like(sums[:, :, :1])), dim=2)
