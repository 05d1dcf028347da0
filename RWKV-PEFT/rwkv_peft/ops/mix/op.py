"""What a block does beside its linear layers, LayerNorms and WKV6: the mixes of time-mix and channel-mix, the decay,
GroupNorm with the gate, squared ReLU.

`ops/mix/reference.py` has the definitions, which run where nothing better does. On CPU in fp32 and bf16 compiled
operators take over where they can be built (cuda/mix): one pass over memory each, fp32 inside, and less kept for the
backward. B batch, T tokens, C n_embd, A dim_att, R rank.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_peft.ops.mix import reference as mix_reference
from rwkv_peft.ops.mix.native import load_native
from rwkv_peft.ops.products import in_own_dtype

logger = logging.getLogger(__name__)


def ddlerp(
    x: Tensor, last: Tensor, maa_x: Tensor, w1: Tensor, maa: Tensor, w2: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Data-dependent linear interpolation (Eagle and Finch, arXiv:2404.05892): x moved towards its predecessor, by how
    much depends on the data. With d = previous - x:

        low_rank = tanh((x + d maa_x) w1),  out_m = x + d (maa_m + low_rank_m w2_m)

    The compiled form keeps x and the low-rank activations for the backward. Parameters may be wider than x, here and
    below.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first; x's dtype.
        maa_x: (C,), the mix that the low-rank products see.
        w1: (C, 5 R).
        maa: (5, C), what amounts are without data.
        w2: (5, R, C).
        starts: (B, T) bool, or None for nowhere: tokens that begin a text, whose predecessor is the zero vector.
    Returns:
        Five times (B, T, C).
    """
    if _native(x):
        return torch.ops.rwkv_peft.ddlerp(x, last, maa_x, w1, maa, w2, starts)[:5]
    return mix_reference.ddlerp(x, last, maa_x, w1, maa, w2, starts)


def shift_lerp(x: Tensor, last: Tensor, maa: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x moved towards its predecessor by two fixed amounts a channel.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first; x's dtype.
        maa: (2, C).
        starts: as for `ddlerp`.
    Returns:
        Twice (B, T, C).
    """
    if _native(x):
        return torch.ops.rwkv_peft.shift_lerp(x, last, maa, starts)
    return mix_reference.shift_lerp(x, last, maa, starts)


def decay(x: Tensor, base: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """w of exp(-exp(w)): base + tanh(x w1) w2, (B, T, A), in fp32 or wider: bf16 has too few bits for a long memory.

    x (B, T, C), base (A,), w1 (C, R), w2 (R, A).
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return _WideDecay.apply(x, base, w1, w2)
    return mix_reference.decay(x, base, w1, w2)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of y over the channels of each token's groups, times silu(gate).

    y, gate (B, T, A); weight, bias (A,). The compiled form keeps y and gate for the backward.
    """
    if _native(y):
        return torch.ops.rwkv_peft.gated_norm(y, gate, weight, bias, groups, eps)
    return mix_reference.gated_norm(y, gate, weight, bias, groups, eps)


def relu_square(k: Tensor) -> Tensor:
    """relu(k)^2. The compiled form keeps its output alone, which the next layer keeps as its input anyway."""
    if _native(k):
        return torch.ops.rwkv_peft.relu_square(k)
    return mix_reference.relu_square(k)


class _WideDecay(torch.autograd.Function):
    """`decay` for bf16 with products in fp32, which many CPUs do faster. Keeps tanh's output, and x where w1 trains."""

    @staticmethod
    @in_own_dtype
    def forward(ctx, x: Tensor, base: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        low_rank = torch.tanh(x.flatten(0, 1).float() @ w1.float())  # (B*T, R)
        ctx.save_for_backward(low_rank, w1, w2, x if ctx.needs_input_grad[2] else None)
        ctx.base_dtype = base.dtype
        return torch.addmm(base.float(), low_rank, w2.float()).unflatten(0, x.shape[:2])

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(ctx, grad_w: Tensor) -> tuple[Tensor | None, ...]:
        low_rank, w1, w2, x = ctx.saved_tensors
        _, wants_base, wants_w1, wants_w2 = ctx.needs_input_grad
        grad = grad_w.flatten(0, 1)  # (B*T, A)
        grad_product = (grad @ w2.float().T) * (1 - low_rank.square())  # (B*T, R)
        grad_x = (grad_product @ w1.float().T).bfloat16().unflatten(0, grad_w.shape[:2])
        grad_base = grad.sum(0).to(ctx.base_dtype) if wants_base else None
        grad_w1 = (x.flatten(0, 1).float().T @ grad_product).to(w1.dtype) if wants_w1 else None
        grad_w2 = (low_rank.T @ grad).to(w2.dtype) if wants_w2 else None
        return grad_x, grad_base, grad_w1, grad_w2


def _native(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return _has_compiled()


@torch.compiler.assume_constant_result  # torch.compile must not look into the building of a library
def _has_compiled() -> bool:
    return _load_compiled()


@functools.cache  # so that it is said once
def _load_compiled() -> bool:
    reason = load_native()
    if reason is not None:
        logger.warning("mixes on cpu: slower torch operations, as the compiled ones are missing: %s", reason)
    return reason is None
