"""The definition of WKV6: one token at a time. Every backend is tested against it.

B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the RWKV-6 recurrence ("Finch" in Eagle and Finch, arXiv:2404.05892) one token at a time.

    For each head, with the state S and all other values as row vectors:
        y_t = r_t (diag(u) k_t^T v_t + S_{t-1})
        S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t^T v_t

    Args:
        r, k, v, w: (B, T, H, N), any float dtype; the computation uses the widest of their dtypes.
        u: (H, N).
        state: (B, H, N, N), indexed [key][value]; None means zeros.
    Returns:
        y (B, T, H, N) and the state after the last token (B, H, N, N). Both are differentiable by autograd. If w is
        greater than 88 (fp32) or 709 (float64), exp(w) overflows and the gradient of w is NaN.
    """
    B, T, H, N = r.shape
    decay = torch.exp(-torch.exp(w))
    if state is None:
        state = torch.zeros(B, H, N, N, dtype=torch.result_type(k, decay), device=r.device)
    outputs = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # (B, H, N, N)
        outputs.append(torch.einsum("bhi,bhij->bhj", r[:, t], u[..., None] * kv + state))
        state = decay[:, t, :, :, None] * state + kv
    return torch.stack(outputs, dim=1), state
