"""The element-wise steps of a block: the mixes of time-mix and channel-mix, the decay, GroupNorm with the gate, and
squared ReLU.

`ops/mix/reference.py` has the definitions in plain torch. On the CPU, in fp32 and bf16, compiled operators (cuda/mix)
replace them if they can be built. Each makes one pass over memory, computes in fp32, and saves less for backward.
B batch, T tokens, C n_embd, A dim_att, R rank.
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
    """Interpolate between each token and its predecessor, with data-dependent amounts (ddlerp, arXiv:2404.05892).

    With d = previous - x:

        low_rank = tanh((x + d maa_x) w1),  out_m = x + d (maa_m + low_rank_m w2_m)

    The compiled form saves x and the low-rank activations for backward. In this function and those below, parameters
    may have a wider dtype than x.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first one, in x's dtype.
        maa_x: (C,), the amounts for the input of the low-rank products.
        w1: (C, 5 R).
        maa: (5, C), the constant part of the amounts.
        w2: (5, R, C).
        starts: (B, T) bool, True for the first token of a text, whose predecessor is the zero vector. None means that
            no text starts in these rows.
    Returns:
        Five tensors (B, T, C): the inputs of decay, key, value, receptance and gate.
    """
    if _native(x):
        return torch.ops.rwkv_peft.ddlerp(x, last, maa_x, w1, maa, w2, starts)[:5]
    return mix_reference.ddlerp(x, last, maa_x, w1, maa, w2, starts)


def shift_lerp(x: Tensor, last: Tensor, maa: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Interpolate between each token and its predecessor, with two fixed amounts per channel.

    Args:
        x: (B, T, C).
        last: (B, C), the token before the first one, in x's dtype.
        maa: (2, C), the amounts.
        starts: as for `ddlerp`.
    Returns:
        Two tensors (B, T, C): the inputs of key and receptance.
    """
    if _native(x):
        return torch.ops.rwkv_peft.shift_lerp(x, last, maa, starts)
    return mix_reference.shift_lerp(x, last, maa, starts)


def decay(x: Tensor, base: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return w = base + tanh(x w1) w2, (B, T, A), which gives the decay exp(-exp(w)).

    The result is in fp32 or wider: bf16 is not precise enough for decays close to 1.

    Args:
        x: (B, T, C).
        base: (A,).
        w1: (C, R).
        w2: (R, A).
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return _WideDecay.apply(x, base, w1, w2)
    return mix_reference.decay(x, base, w1, w2)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Return GroupNorm(y) * silu(gate), where GroupNorm normalizes each token's channels in `groups` groups.

    y and gate are (B, T, A), weight and bias (A,). The compiled form saves y and gate for backward.
    """
    if _native(y):
        return torch.ops.rwkv_peft.gated_norm(y, gate, weight, bias, groups, eps)
    return mix_reference.gated_norm(y, gate, weight, bias, groups, eps)


def relu_square(k: Tensor) -> Tensor:
    """Return relu(k)^2. The compiled form saves only its output, which the next layer saves anyway as its input."""
    if _native(k):
        return torch.ops.rwkv_peft.relu_square(k)
    return mix_reference.relu_square(k)


class _WideDecay(torch.autograd.Function):
    """Computes `decay` for bf16 with products in fp32, which many CPUs compute faster.

    Saves the output of tanh for backward, and x if w1 needs a gradient.
    """

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


@torch.compiler.assume_constant_result  # torch.compile must not trace the build
def _has_compiled() -> bool:
    return _load_compiled()


@functools.cache  # logs the warning once
def _load_compiled() -> bool:
    reason = load_native()
    if reason is not None:
        logger.warning("mixes on cpu: using slower torch operations; the compiled ones are not available: %s", reason)
    return reason is None
