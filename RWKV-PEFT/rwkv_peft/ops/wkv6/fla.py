"""WKV6 by flash-linear-attention's Triton kernels, an optional package for GPUs.

Written for `fla.ops.rwkv6.chunk_rwkv6` of 0.2.0 to 0.6.0: rows (B, T, H, K), its w the logarithm of the decay.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE_TYPES = ("cuda",)

W_MAX = 5.0
"""exp(-exp(5)) is 0 in fp32, and its gradient with it. fla takes differences of the logarithms' sums over 64 tokens, so
a larger w, which changes nothing else, would cost the tokens after it their last digits, and an infinite one all."""


def load_fla(device_type: str) -> str | None:
    """Import fla's operator.

    Returns:
        None when it can run on such a device, else why not.
    """
    if device_type not in DEVICE_TYPES:
        return f"flash-linear-attention runs on CUDA devices only, not on {device_type}"
    try:
        _chunk_rwkv6()
    except ModuleNotFoundError as error:
        if error.name == "fla":
            return "the package is not installed (pip install flash-linear-attention)"
        return f"flash-linear-attention cannot be imported: {error}"
    except ImportError as error:
        return f"flash-linear-attention cannot be imported: {error}"
    return None


@functools.cache
def _chunk_rwkv6() -> Callable[..., tuple[Tensor, Tensor]]:
    return importlib.import_module("fla.ops.rwkv6").chunk_rwkv6


def wkv6_fla(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.wkv6_reference` by fla's chunk-parallel kernels, which `load_fla` has found.

    Its products are in r's dtype with fp32 sums, in TF32 for fp32; states are fp32.

    Args:
        r, k, v: (B, T, H, N), fp32, bf16 or fp16. w (B, T, H, N), u (H, N), state (B, H, N, N): fp32.
    Returns:
        y (B, T, H, N) in r's dtype and the last state (B, H, N, N) in fp32.
    """
    log_decay = -torch.exp(w.clamp(max=W_MAX))
    # By name: before 0.2.0 these had other names, and rows were (B, H, T, K).
    rows = {"r": r, "k": k, "v": v, "w": log_decay, "u": u}
    return _chunk_rwkv6()(**rows, scale=1.0, initial_state=state, output_final_state=True)
