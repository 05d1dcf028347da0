"""The public WKV6 operator, and the choice of the backend that computes it.

One function serves training, infctx, state tuning and inference. B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_peft.errors import UserError
from rwkv_peft.ops.wkv6.chunked import wkv6_chunked
from rwkv_peft.ops.wkv6.fla import load_fla, wkv6_fla
from rwkv_peft.ops.wkv6.native import CUDA_HEAD_SIZES, load_native, wkv6_native, wkv6_step_native
from rwkv_peft.ops.wkv6.reference import wkv6_reference

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "fla", "torch", "reference")
"""auto: native if it can be built, otherwise torch. native: the compiled C++ or CUDA operator. fla: the kernels of
flash-linear-attention, used only on request. torch: matrix products of chunks. reference: one token at a time."""

_FORGET = {torch.float32: 5.0, torch.float64: 7.0}
"""A w for which the decay exp(-exp(w)) and its gradient are exactly 0. It is as small as possible: a backend that adds
the logarithms -exp(w) becomes less precise as w grows (relative error of fla: 1e-5 at 5, 1e-2 at 12)."""


class Choice(NamedTuple):
    """The backend that computes WKV6 on a device, and the reason for this choice."""

    backend: str
    why: str


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the RWKV-6 recurrence ("Finch" in Eagle and Finch, arXiv:2404.05892).

    `ops/wkv6/reference.py` has the definition. The operator is differentiable in all six inputs and modifies none.

    Args:
        r, k, v: (B, T, H, N), all in the same dtype: fp32, bf16, fp16 or float64. Any T >= 1 and any strides.
        w: (B, T, H, N), decay = exp(-exp(w)), in r's dtype or fp32. Any finite value is allowed.
        u: (H, N), the bonus of the current token, in r's dtype or fp32.
        state: (B, H, N, N) in fp32, indexed [key][value]; None means zeros.
        starts: (B, T) bool, for rows that hold several texts: True for the first token of a text, before which the
            state is cleared. None means that no text starts in these rows. The last token of each text has no bonus
            u k v in its y. Its target is the first token of the next text, so exclude it from the loss.
        backend: one of `BACKENDS`. `auto` uses `native` if it can be built, otherwise `torch`, and logs the choice. For
            float64, `auto` uses the reference; all inputs must then be float64.
    Returns:
        y (B, T, H, N) in r's dtype and the state after the last token (B, H, N, N) in fp32. Sums are in fp32. If r is
        float64, sums and state are float64.
    Raises:
        ValueError: the shape, dtype or device of an argument is wrong.
        UserError: the requested backend is `native` and cannot be built, or `fla` and cannot be imported.
    """
    wide = torch.float64 if r.dtype == torch.float64 else torch.float32
    if state is None and r.dim() == 4:
        B, _, H, N = r.shape
        state = torch.zeros(B, H, N, N, dtype=wide, device=r.device)
    _check_arguments(r, k, v, w, u, state, wide)
    w = w.to(wide)
    if starts is not None:
        k, w, state = cleared(k, w, state, starts)
    run = {"native": _native, "fla": wkv6_fla, "torch": _torch, "reference": _reference}[_backend_for(r, backend)]
    y, state_out = run(r, k, v, w, u.to(wide), state)
    return y.to(r.dtype), state_out


@torch.no_grad()
def wkv6_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute `wkv6` for one token, as in generation, and update `state` in place. No gradients.

    Args:
        r, k, v, w: (B, 1, H, N); dtypes, u and backend as for `wkv6`.
        state: (B, H, N, N), overwritten with the state after the token.
    Returns:
        y (B, 1, H, N) in r's dtype.
    Raises:
        ValueError: more than one token, or as for `wkv6`.
    """
    if r.dim() == 4 and r.shape[1] != 1:
        raise ValueError(f"wkv6_step: r must have one token, (B, 1, H, N); found {r.shape[1]} tokens")
    wide = torch.float64 if r.dtype == torch.float64 else torch.float32
    _check_arguments(r, k, v, w, u, state, wide)
    low = r.dtype == torch.float16
    if state.is_contiguous() and not r.is_cuda and not low and _backend_for(r, backend) == "native":
        return wkv6_step_native(r, k, v, w.to(wide), u.to(wide), state)
    y, after = wkv6(r, k, v, w, u, state, backend=backend)
    state.copy_(after)
    return y


def active_backend(device: torch.device | str, backend: str = "auto") -> Choice:
    """Return the backend that `wkv6(..., backend=backend)` uses on `device` for fp32, bf16 and fp16.

    Builds the native operator if necessary.

    Raises:
        ValueError: unknown backend.
        UserError: the requested backend is `native` and cannot be built, or `fla` and cannot be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"wkv6: backend must be one of {', '.join(BACKENDS)}; found {backend!r}")
    device_type = torch.device(device).type
    if backend == "auto":
        return _automatic(device_type)
    if backend == "native" and (reason := load_native(device_type)):
        raise UserError(
            "wkv6 backend native",
            f"the compiled operator is not available on {device_type}: {reason}",
            hint="Fix this, or use backend torch (slower, needs no compiler) or auto.",
        )
    if backend == "fla" and (reason := load_fla(device_type)):
        raise UserError("wkv6 backend fla", reason, hint="Use backend native, torch or auto.")
    return Choice(backend, "requested")


@functools.cache  # logs the choice once per type of device
def _automatic(device_type: str) -> Choice:
    reason = load_native(device_type)
    if reason is None:
        choice = Choice("native", "the compiled operator is available")
        logger.info("wkv6 on %s: %s, %s", device_type, *choice)
    else:
        choice = Choice("torch", reason)
        logger.warning("wkv6 on %s: using the slower torch backend; native is not available: %s", device_type, reason)
    return choice


@torch.compiler.assume_constant_result  # torch.compile must not trace the build
def _chosen_backend(device_type: str, backend: str) -> str:
    return active_backend(device_type, backend).backend


def _backend_for(r: Tensor, backend: str) -> str:
    """Return the backend for this call, which also depends on the dtype and the head size of r."""
    automatic = backend == "auto"
    if automatic and r.dtype == torch.float64:
        return "reference"
    if backend == "fla" and r.dtype == torch.float64:
        raise ValueError("wkv6: backend fla does not support float64; use torch or reference")
    chosen = _chosen_backend(r.device.type, backend)
    if chosen == "native" and (obstacle := _native_obstacle(r)):
        if automatic:
            return "torch"
        raise ValueError(f"wkv6: backend native {obstacle}")
    return chosen


def _native_obstacle(r: Tensor) -> str | None:
    if r.dtype == torch.float64:
        return "does not support float64; use torch or reference"
    if r.is_cuda and r.shape[-1] not in CUDA_HEAD_SIZES:
        return f"supports head sizes {CUDA_HEAD_SIZES} on CUDA; found {r.shape[-1]}; use torch"
    return None


def _native(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    if r.dtype == torch.float16 and not r.is_cuda:
        r, k, v = r.float(), k.float(), v.float()
    return wkv6_native(r, k, v, w, u, state)


def _torch(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return wkv6_chunked(r.to(w.dtype), k.to(w.dtype), v.to(w.dtype), w, u, state)


def _reference(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return wkv6_reference(r.to(w.dtype), k.to(w.dtype), v.to(w.dtype), w, u, state)


def cleared(k: Tensor, w: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return k, w and state changed so that the state is zero before each start.

    S_t = exp(-exp(w_t)) S_{t-1} + k_t^T v_t is zero if both k_t and the decay of the token before a start are zero. No
    gradient passes this token, neither to the tokens before it nor to its own k and w.
    """
    if starts.shape != k.shape[:2] or starts.dtype != torch.bool:
        raise ValueError(f"wkv6: starts must be bool {tuple(k.shape[:2])}; found {starts.dtype} {tuple(starts.shape)}")
    before = F.pad(starts[:, 1:], (0, 1))[..., None, None]  # (B, T, 1, 1): the tokens before a start
    state = state.masked_fill(starts[:, 0, None, None, None], 0)
    return k.masked_fill(before, 0), w.masked_fill(before, _FORGET[w.dtype]), state


def _check_arguments(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, wide: torch.dtype
) -> None:
    if r.dim() != 4 or 0 in r.shape:
        raise ValueError(f"wkv6: r must be (B, T, H, N) with no dimension of size 0; found {tuple(r.shape)}")
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"wkv6: r must be float32, bfloat16, float16 or float64; found {r.dtype}")
    B, _, H, N = r.shape
    rows, either = tuple(r.shape), {r.dtype, wide}
    expected = {
        "k": (k, rows, {r.dtype}),
        "v": (v, rows, {r.dtype}),
        "w": (w, rows, either),
        "u": (u, (H, N), either),
        "state": (state, (B, H, N, N), {wide}),
    }
    for name, (x, shape, dtypes) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"wkv6: {name} must be {shape} to match r {rows}; found {tuple(x.shape)}")
        if x.dtype not in dtypes:
            allowed = " or ".join(sorted(str(dtype) for dtype in dtypes))
            raise ValueError(f"wkv6: {name} must be {allowed} if r is {r.dtype}; found {x.dtype}")
        if x.device != r.device:
            raise ValueError(f"wkv6: {name} must be on the device of r, {r.device}; found {x.device}")
