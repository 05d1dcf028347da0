"""The training loss: cross-entropy over the trained tokens, with RWKV-LM's pull on large logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

L2WRAP = 1e-4


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
