"""The compiled `rwkv_peft::wkv6` as PyTorch sees it: loading, fake tensors, autograd.

Schemas and kernels are in cuda/wkv6; this module adds what is easier said in Python.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rwkv_peft.ops.build import load_library

CHUNK = {"cpu": 128, "cuda": 64}
"""Tokens between two states kept for the backward, which computes those in between again. At N = 64 and fp32 a state
takes as much memory as the r, k, v and w of 16 tokens. On CPU what belongs to one chunk has to stay in a core's L2
cache (0.5 MB); CUDA's chunks are also what runs in parallel."""

CUDA_HEAD_SIZES = (32, 64, 128)


@functools.cache
def load_native(device_type: str) -> str | None:
    """Build or find the op for "cpu" or "cuda" and register the rest of it.

    Returns:
        None when it is ready, else why it is not.
    """
    if device_type not in ("cpu", "cuda"):
        return f"there is no compiled op for {device_type} devices"
    if reason := _load_schemas():
        return reason
    return load_library("wkv6_cuda") if device_type == "cuda" else None


@functools.cache
def _load_schemas() -> str | None:
    """The CPU library also defines the operators, so it comes first on every device."""
    reason = load_library("wkv6")
    if reason is None:
        torch.library.register_fake("rwkv_peft::wkv6", _fake_forward)
        torch.library.register_fake("rwkv_peft::wkv6_backward", _fake_backward)
        torch.library.register_fake("rwkv_peft::wkv6_step", _fake_step)
        torch.library.register_autograd("rwkv_peft::wkv6", _backward, setup_context=_setup_context)
        torch.library.register_autograd("rwkv_peft::wkv6_backward", _refuse_second_derivative)
    return reason


def wkv6_native(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.wkv6_reference` by the compiled op, which `load_native` has loaded.

    Args:
        r, k, v: (B, T, H, N), fp32 or bf16, on CUDA also fp16. w (B, T, H, N), u (H, N), state (B, H, N, N): fp32.
    Returns:
        y (B, T, H, N) in r's dtype and the last state (B, H, N, N) in fp32. For the backward only the inputs and the
        state before every `CHUNK`-th token are kept.
    """
    inputs = (r, k, v, w, u, state)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    chunk = min(CHUNK[r.device.type], r.shape[1]) if needs_grad else 0
    y, state_out, _ = torch.ops.rwkv_peft.wkv6(*inputs, chunk)
    return y, state_out


def wkv6_step_native(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """One token (T = 1) on CPU; arguments as for `wkv6_native`. Updates `state`, which must be contiguous, in place.

    Returns:
        y (B, 1, H, N). No derivative is defined.
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
    ctx.set_materialize_grads(False)  # or autograd would fill a gradient of chunk_states with zeros
    # The initial state is the first of chunk_states.
    ctx.save_for_backward(*tensors[:5], chunk_states)


def _backward(ctx, grad_y, grad_state_out, _grad_chunk_states):
    saved = ctx.saved_tensors  # once only: under checkpointing each access would recompute
    r, chunk_states = saved[0], saved[5]
    if grad_y is None:
        grad_y = torch.zeros_like(r)
    if grad_state_out is None:
        grad_state_out = torch.zeros_like(chunk_states[:, :, 0])
    grads = torch.ops.rwkv_peft.wkv6_backward(*saved, grad_y, grad_state_out, ctx.chunk)
    return (*grads, None)


def _refuse_second_derivative(ctx, *_grads):
    raise RuntimeError("wkv6: the compiled op has no second derivative; take backend torch or reference")
