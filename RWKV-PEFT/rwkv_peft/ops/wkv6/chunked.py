"""WKV6 in plain PyTorch, a chunk of tokens at a time: what runs where nothing can be compiled.

B batch, H heads, c tokens of a chunk, N head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8
"""Tokens taken at once. The decays between all pairs of them are (c, c, N), so work and memory per token grow with c;
below 8 the number of small products takes over (measured on CPU, forward + backward: 8 is 1.6x faster than 16)."""

_W_MAX = 7.0
"""exp(-exp(7)) is 0 in float64 too, and its gradient with it: a larger w changes nothing but the size of exp(w)."""


def wkv6_chunked(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.wkv6_reference` by matrix products, safe for every finite w.

    Decays multiply, so their logarithms -exp(w) add up. Only sums over the tokens in between are ever exponentiated:
    never positive, and never a difference of two long sums, whose rounding would grow with w.

    Args:
        r, k, v, w: (B, T, H, N), float32 or float64, one dtype.
        u: (H, N). state: (B, H, N, N), indexed [key][value].
    Returns:
        y (B, T, H, N) and the last state (B, H, N, N). Differentiable by autograd, which keeps c*c*N numbers per
        chunk and head.
    """
    log_decay = -torch.exp(w.clamp(max=_W_MAX))
    outputs = []
    for chunk in zip(*(x.transpose(1, 2).split(CHUNK, dim=2) for x in (r, k, v, log_decay)), strict=True):
        y, state = _one_chunk(*chunk, u, state)
        outputs.append(y)
    return torch.cat(outputs, dim=2).transpose(1, 2), state  # (B, T, H, N)


def _one_chunk(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """r, k, v, log_decay: (B, H, c, N); returns y (B, H, c, N) and the next state."""
    since_start = log_decay.cumsum(2)  # (B, H, c, N), token t included
    to_end = log_decay.flip(2).cumsum(2).flip(2)  # token t included

    weights = _pair_weights(log_decay, u)  # (B, H, c, c, N)
    scores = ((weights * k[:, :, None]) @ r[..., None]).squeeze(-1)  # (B, H, c, c), [t][s]
    y = scores @ v + (r * _before(since_start).exp()) @ state

    k_at_end = k * _after(to_end).exp()
    state = since_start[:, :, -1, :, None].exp() * state + k_at_end.transpose(2, 3) @ v
    return y, state


def _pair_weights(log_decay: Tensor, u: Tensor) -> Tensor:
    """How much of the pair (k_s, v_s) is left for token t, per key channel: (B, H, c, c, N), [t][s].

    The product of the decays of s+1 .. t-1 for s < t, the bonus u for s = t, nothing for s > t.
    """
    c = log_decay.shape[2]
    earlier = torch.ones(c, c, dtype=torch.bool, device=log_decay.device).tril(-1)[..., None]  # s < t
    diagonal = torch.eye(c, dtype=torch.bool, device=log_decay.device)[..., None]
    between = torch.where(earlier, log_decay[:, :, :, None], 0.0).cumsum(2)  # sum over s+1 .. t
    weights = torch.where(earlier, _before(between).exp(), 0.0)
    return torch.where(diagonal, u[:, None, None, :], weights)


def _before(sums: Tensor) -> Tensor:
    """Running sums over dim 2 moved to stop before token t."""
    return torch.cat((torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]), dim=2)


def _after(sums: Tensor) -> Tensor:
    """Running sums to the end over dim 2 moved to start after token t."""
    return torch.cat((sums[:, :, 1:], torch.zeros_like(sums[:, :, :1])), dim=2)
