"""Inputs and comparisons for the tests of WKV6."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_peft.ops.wkv6.reference import wkv6_reference

NAMES = ("y", "state_out", "grad_r", "grad_k", "grad_v", "grad_w", "grad_u", "grad_state")


def make_inputs(B: int, T: int, H: int, N: int, *, dtype=torch.float32, w_mean: float = -2.0, seed: int = 0):
    """Return (r, k, v, w, u, state). The decays of w range from almost 1 to almost 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    r, k, v = (normal(B, T, H, N).to(dtype) for _ in range(3))
    return r, k, v, w_mean + 2 * normal(B, T, H, N), normal(H, N), normal(B, H, N, N)


def make_output_grads(inputs, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return gradients of y and of the last state. Neither is zero, so both must be propagated."""
    generator = torch.Generator().manual_seed(seed)
    r, state = inputs[0], inputs[5]
    return torch.randn(r.shape, generator=generator).to(r.dtype), torch.randn(state.shape, generator=generator)


def outputs_and_grads(function, inputs, output_grads) -> dict[str, Tensor]:
    """Return both outputs and all six gradients of `function` by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(output_grads, outputs, strict=True)])
    return dict(zip(NAMES, (*(y.detach() for y in outputs), *grads), strict=True))


def reference_results(inputs, output_grads) -> dict[str, Tensor]:
    """Return the results of the float64 reference for the same inputs."""
    return outputs_and_grads(wkv6_reference, [x.double() for x in inputs], [g.double() for g in output_grads])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected||, or ||found|| if `expected` is zero."""
    expected = expected.double().cpu()
    scale = expected.norm().item()
    return (found.double().cpu() - expected).norm().item() / (scale or 1.0)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = relative_error(found[name], value)
        assert error < tolerance, f"{name}: relative error {error:.1e}"  # a NaN fails too
