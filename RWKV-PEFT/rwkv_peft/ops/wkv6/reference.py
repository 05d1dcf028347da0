"""WKV6 and the loss as their definitions read: the yardsticks of every fast path.

B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

L2WRAP = 1e-4
"""RWKV-LM's pull on the largest logit of each token."""


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The RWKV-6 recurrence ("Finch" of Eagle and Finch, arXiv:2404.05892), one token at a time.

    Per head, with S the state and everything else a row vector:
        y_t = r_t (diag(u) k_t^T v_t + S_{t-1})
        S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t^T v_t

    Args:
        r, k, v, w: (B, T, H, N), any float dtype, all computed in the widest among them.
        u: (H, N).
        state: (B, H, N, N), indexed [key][value]; None means zeros.
    Returns:
        y (B, T, H, N) and the state after the last token (B, H, N, N). Autograd differentiates both; beyond
        w = 88 (fp32) or 709 (float64) exp(w) overflows and w's gradient is NaN.
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


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens where `mask` is set, in fp32 or wider.

    Its gradient carries RWKV-LM's L2Wrap: 1e-4 x the largest logit, pulling it towards 0, averaged over the
    trained tokens; the value does not.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64.
        mask: (B, T) bool; no trained token at all gives 0.
    Returns:
        A scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (B*T,)
    pull = 0.5 * L2WRAP * logits.amax(-1).flatten().square()  # its gradient is 1e-4 x the largest logit
    weight = mask.flatten().to(loss.dtype)
    return ((loss + pull - pull.detach()) * weight).sum() / weight.sum().clamp(min=1)
