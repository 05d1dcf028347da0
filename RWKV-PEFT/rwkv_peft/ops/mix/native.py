"""The compiled operators of cuda/mix: loading, and registering their fake tensors and autograd with PyTorch.

Schemas and loops are in cuda/mix. `ops/mix/op.py` documents what each operator computes.
"""

from __future__ import annotations

import functools

import torch

from rwkv_peft.ops.build import load_library


@functools.cache
def load_native() -> str | None:
    """Load the compiled operators (built on first use) and register their fake tensors and autograd.

    Returns:
        None if they are ready, otherwise the reason why not.
    """
    reason = load_library("mix")
    if reason is None:
        for name, (fake, fake_backward, setup_context, backward) in _OPERATORS.items():
            torch.library.register_fake(f"rwkv_peft::{name}", fake)
            torch.library.register_fake(f"rwkv_peft::{name}_backward", fake_backward)
            torch.library.register_autograd(f"rwkv_peft::{name}", backward, setup_context=setup_context)
            refuse = functools.partial(_refuse_second_derivative, name)
            torch.library.register_autograd(f"rwkv_peft::{name}_backward", refuse)
    return reason


def _refuse_second_derivative(name, ctx, *_grads):
    raise RuntimeError(f"{name}: the compiled operator has no second derivative; use float64 inputs")


def _trained(grads, like, train):
    """Return the parameters' gradients in their own dtype and shape, or None for each if `train` is False."""
    return [grad.to(p.dtype).view(p.shape) if train else None for grad, p in zip(grads, like, strict=True)]


# ------------------------------------------------------------------------------------------------------------- ddlerp


def _fake_ddlerp(x, last, maa_x, w1, maa, w2, starts=None):
    low_rank = x.new_empty((x.shape[0] * x.shape[1], w1.shape[1]), dtype=torch.float32)
    return (*(x.new_empty(x.shape) for _ in range(5)), low_rank)


def _fake_ddlerp_backward(x, last, maa_x, w1, maa, w2, low_rank, gw, gk, gv, gr, gg, train, starts=None):
    parameters = [maa_x.new_empty(p.shape if train else 0, dtype=torch.float32) for p in (maa_x, w1, maa, w2)]
    return (x.new_empty(x.shape), last.new_empty(last.shape), *parameters)


def _setup_ddlerp(ctx, inputs, output):
    *tensors, starts = inputs
    low_rank = output[5]
    ctx.mark_non_differentiable(low_rank)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, low_rank, starts)


def _backward_ddlerp(ctx, *grads):
    *saved, starts = ctx.saved_tensors  # read only once: under checkpointing each access would recompute
    x, parameters = saved[0], saved[2:6]
    grads = [torch.zeros_like(x) if grad is None else grad for grad in grads[:5]]
    train = any(ctx.needs_input_grad[2:])
    grad_x, grad_last, *trained = torch.ops.rwkv_peft.ddlerp_backward(*saved, *grads, train, starts)
    return (grad_x, grad_last, *_trained(trained, parameters, train), None)


# --------------------------------------------------------------------------------------------------------- shift_lerp


def _fake_shift_lerp(x, last, maa, starts=None):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_shift_lerp_backward(x, last, maa, grad_k, grad_r, starts=None):
    B, _, C = grad_k.shape
    grad_maa = maa.new_empty(maa.shape if x is not None else 0, dtype=torch.float32)
    return grad_k.new_empty(grad_k.shape), grad_k.new_empty((B, C)), grad_maa


def _setup_shift_lerp(ctx, inputs, output):
    x, last, maa, starts = inputs
    ctx.set_materialize_grads(False)
    ctx.train = ctx.needs_input_grad[2]
    ctx.save_for_backward(maa, starts, *((x, last) if ctx.train else ()))


def _backward_shift_lerp(ctx, grad_k, grad_r):
    maa, starts, *inputs = ctx.saved_tensors
    grad_k = torch.zeros_like(grad_r) if grad_k is None else grad_k
    grad_r = torch.zeros_like(grad_k) if grad_r is None else grad_r
    x, last = inputs if ctx.train else (None, None)
    grad_x, grad_last, grad_maa = torch.ops.rwkv_peft.shift_lerp_backward(x, last, maa, grad_k, grad_r, starts)
    return (grad_x, grad_last, *_trained([grad_maa], [maa], ctx.train), None)


# --------------------------------------------------------------------------------------------------------- gated_norm


def _fake_gated_norm(y, gate, weight, bias, groups, eps):
    return y.new_empty(y.shape)


def _fake_gated_norm_backward(y, gate, weight, bias, groups, eps, grad, train):
    parameters = [weight.new_empty(p.shape if train else 0, dtype=torch.float32) for p in (weight, bias)]
    return (y.new_empty(y.shape), y.new_empty(y.shape), *parameters)


def _setup_gated_norm(ctx, inputs, output):
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_gated_norm(ctx, grad):
    saved = ctx.saved_tensors
    train = any(ctx.needs_input_grad[2:4])
    grads = torch.ops.rwkv_peft.gated_norm_backward(*saved, ctx.groups, ctx.eps, grad, train)
    return (*grads[:2], *_trained(grads[2:], saved[2:], train), None, None)


# -------------------------------------------------------------------------------------------------------- relu_square


def _fake_relu_square(k):
    return k.new_empty(k.shape)


def _fake_relu_square_backward(grad, out):
    return out.new_empty(out.shape)


def _setup_relu_square(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward_relu_square(ctx, grad):
    return torch.ops.rwkv_peft.relu_square_backward(grad, *ctx.saved_tensors)


_OPERATORS = {
    "ddlerp": (_fake_ddlerp, _fake_ddlerp_backward, _setup_ddlerp, _backward_ddlerp),
    "shift_lerp": (_fake_shift_lerp, _fake_shift_lerp_backward, _setup_shift_lerp, _backward_shift_lerp),
    "gated_norm": (_fake_gated_norm, _fake_gated_norm_backward, _setup_gated_norm, _backward_gated_norm),
    "relu_square": (_fake_relu_square, _fake_relu_square_backward, _setup_relu_square, _backward_relu_square),
}
