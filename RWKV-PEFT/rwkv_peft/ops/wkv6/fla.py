"""WKV6 with the Triton kernels of flash-linear-attention, an optional package for GPUs.

Written for `fla.ops.rwkv6.chunk_rwkv6` of versions 0.2.0 to 0.6.0, which takes rows (B, T, H, K) and the logarithm of
the decay as w.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE_TYPES = ("cuda",)

W_MAX = 5.0
"""Largest w that is passed on. exp(-exp(5)) and its gradient are 0 in fp32, so a larger w would give the same decay.
But fla subtracts sums of the logarithms over 64 tokens: a larger w would make the following tokens less precise, and an
infinite w would make them NaN."""


def load_fla(device_type: str) -> str | None:
    """Import fla's operator.

    Returns:
        None if it can run on this type of device, otherwise the reason why not.
    """
    if device_type not in DEVICE_TYPES:
        return f"flash-linear-attention needs a CUDA device; found {device_type}"
    try:
        _chunk_rwkv6()
    except ModuleNotFoundError as error:
        if error.name == "fla":
            return "the package flash-linear-attention is not installed (pip install flash-linear-attention)"
        return f"flash-linear-attention cannot be imported: {error}"
    except ImportError as error:
        return f"flash-linear-attention cannot be imported: {error}"
    return None


@functools.cache
def _chunk_rwkv6() -> Callable[..., tuple[Tensor, Tensor]]:
    return importlib.import_module("fla.ops.rwkv6").chunk_rwkv6


def wkv6_fla(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.wkv6_reference` with fla's chunk-parallel kernels. Call `load_fla` first.

    Products are in r's dtype (TF32 if it is fp32) with fp32 sums. States are fp32.

    Args:
        r, k, v: (B, T, H, N), fp32, bf16 or fp16. w (B, T, H, N), u (H, N), state (B, H, N, N): fp32.
    Returns:
        y (B, T, H, N) in r's dtype and the last state (B, H, N, N) in fp32.
    """
    log_decay = -torch.exp(w.clamp(max=W_MAX))
    # Keyword arguments: versions before 0.2.0 used other names and rows (B, H, T, K), and then fail here.
    rows = {"r": r, "k": k, "v": v, "w": log_decay, "u": u}
    return _chunk_rwkv6()(**rows, scale=1.0, initial_state=state, output_final_state=True)
