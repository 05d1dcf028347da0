"""The compiled operator `rwkv_peft::wkv6`: loading, and registering its fake tensors and autograd with PyTorch.

Schemas and kernels are in cuda/wkv6.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rwkv_peft.ops.build import load_library

CHUNK = {"cpu": 128, "cuda": 64}
"""Number of tokens between two states that are saved for backward, which computes the states in between again. With
N = 64 and fp32, a state takes as much memory as r, k, v and w of 16 tokens. On the CPU, the data of one chunk should
stay in a core's L2 cache (0.5 MB). On CUDA, chunks run in parallel."""

CUDA_HEAD_SIZES = (32, 64, 128)


@functools.cache
def load_native(device_type: str) -> str | None:
    """Load the compiled operator for "cpu" or "cuda" (built on first use) and register its fake tensors and autograd.

    Returns:
        None if it is ready, otherwise the reason why not.
    """
    if device_type not in ("cpu", "cuda"):
        return f"there is no compiled operator for {device_type} devices"
    if reason := _load_schemas():
        return reason
    return load_library("wkv6_cuda") if device_type == "cuda" else None


@functools.cache
def _load_schemas() -> str | None:
    """Load the CPU library, which also defines the schemas; every device needs it."""
    reason = load_library("wkv6")
    if reason is None:
        torch.library.register_fake("rwkv_peft::wkv6", _fake_forward)
        torch.library.register_fake("rwkv_peft::wkv6_backward", _fake_backward)
        torch.library.register_fake("rwkv_peft::wkv6_step", _fake_step)
        torch.library.register_autograd("rwkv_peft::wkv6", _backward, setup_context=_setup_context)
        torch.library.register_autograd("rwkv_peft::wkv6_backward", _refuse_second_derivative)
    return reason


def wkv6_native(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.wkv6_reference` with the compiled operator. Call `load_native` first.

    Args:
        r, k, v: (B, T, H, N), fp32 or bf16; fp16 only on CUDA. w (B, T, H, N), u (H, N), state (B, H, N, N): fp32.
    Returns:
        y (B, T, H, N) in r's dtype and the last state (B, H, N, N) in fp32. Only the inputs and the state before every
        `CHUNK`-th token are saved for backward.
    """
    inputs = (r, k, v, w, u, state)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    chunk = min(CHUNK[r.device.type], r.shape[1]) if needs_grad else 0
    y, state_out, _ = torch.ops.rwkv_peft.wkv6(*inputs, chunk)
    return y, state_out


def wkv6_step_native(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """Compute one token (T = 1) on the CPU and update `state`, which must be contiguous, in place.

    Args as for `wkv6_native`.

    Returns:
        y (B, 1, H, N), without gradients.
    """
    return torch.ops.rwkv_peft.wkv6_step(r, k, v, w, u, state)


def _fake_forward(r, k, v, w, u, state, chunk):
    B, T, H, N = r.shape
    chunks = (T + chunk - 1) // chunk if chunk else 0
    return r.new_empty((B, T, H, N)), state.new_empty((B, H, N, N)), state.new_empty((B, H, chunks, N, N))


def _fake_backward(r, k, v, w, u, chunk_states, grad_y, grad_state_out, chunk):
    like_r = [r.new_empty(r.shape) for _ in range(3)]
    return (*like_r, w.new_empty(w.shape), u.new_empty(u.shape), grad_state_out.new_empty(grad_state_out.shape))


def _fake_step(r, k, v, w, u, state):
    return r.new_empty(r.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.chunk = inputs
    chunk_states = output[2]
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)  # otherwise autograd would allocate a zero gradient for chunk_states
    # The initial state is not saved separately: it is the first of chunk_states.
    ctx.save_for_backward(*tensors[:5], chunk_states)


def _backward(ctx, grad_y, grad_state_out, _grad_chunk_states):
    saved = ctx.saved_tensors  # read only once: under checkpointing each access would recompute
    r, chunk_states = saved[0], saved[5]
    if grad_y is None:
        grad_y = torch.zeros_like(r)
    if grad_state_out is None:
        grad_state_out = torch.zeros_like(chunk_states[:, :, 0])
    grads = torch.ops.rwkv_peft.wkv6_backward(*saved, grad_y, grad_state_out, ctx.chunk)
    return (*grads, None)


def _refuse_second_derivative(ctx, *_grads):
    raise RuntimeError("wkv6: backend native has no second derivative; use backend torch or reference")
