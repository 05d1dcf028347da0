"""WKV6 on a GPU with each backend: precision, reproducibility, and carried states and their gradients."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops.wkv6 import op as wkv6_module
from rwkv_peft.ops.wkv6.op import wkv6
from rwkv_peft.ops.wkv6.reference import wkv6_reference
from tests.gpu.devices import FP32_FLOOR, assert_as_precise_as_plain, each_backend, each_device, skip_without
from tests.ops.wkv6.wkv6_cases import assert_close, make_inputs, make_output_grads, outputs_and_grads, reference_results

SIZES = [(32, 1), (32, 301), (64, 37), (64, 129), (128, 65)]
"""(N, T): odd lengths, one token, and several chunks for every backend."""

every_backend = each_backend("native", "torch", cuda=("native", "torch", "fla"))


def representable(inputs, dtype: torch.dtype) -> list[Tensor]:
    """Return inputs that are exact in `dtype`, with w, u and the state in fp32: only the computation has errors."""
    r, k, v, *wide = inputs
    return [*(x.to(dtype) for x in (r, k, v)), *(x.to(dtype).float() for x in wide)]


def check(device: str, backend: str, inputs, dtype: torch.dtype, function=None) -> None:
    """Compare both outputs and all six gradients with the reference, computed in `dtype`."""
    inputs = representable(inputs, dtype)
    grad_y, grad_state = make_output_grads(inputs)
    grads = grad_y, grad_state.to(dtype).float()
    function = function or partial(wkv6, backend=backend)
    found = outputs_and_grads(function, [x.to(device) for x in inputs], [g.to(device) for g in grads])
    # fla computes fp32 products in TF32, which has the mantissa of fp16.
    plain_dtype = torch.float16 if (backend, dtype) == ("fla", torch.float32) else dtype
    plain = outputs_and_grads(wkv6_reference, [x.to(plain_dtype) for x in inputs], grads)
    exact = reference_results(inputs, grads)
    for results in (plain, exact):
        results["grad_w"] = results["grad_w"].nan_to_num()  # inf * 0 in the reference for very large w; the limit is 0
    assert found["y"].dtype == dtype
    assert found["state_out"].dtype == torch.float32
    assert_as_precise_as_plain(found, plain, exact)
    if (
        backend != "fla"
    ):  # our backends sum in fp32 and round once, which is much more precise than the plain computation
        assert_close(found, exact, max(torch.finfo(dtype).eps / 2, FP32_FLOOR))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "T"), SIZES)
def test_is_as_precise_as_the_plain_computation(device, backend, dtype, N, T):
    skip_without(backend, device)
    check(device, backend, make_inputs(B=2, T=T, H=3, N=N), dtype)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_value", [-1000.0, 5.0, 20.0, 1000.0])
def test_resets_and_holds_inside_a_chunk(device, backend, dtype, w_value):
    skip_without(backend, device)
    inputs = make_inputs(B=1, T=70, H=2, N=64)
    inputs[3][:, 13] = w_value
    inputs[3][:, 40:43, :, ::2] = w_value
    check(device, backend, inputs, dtype)


@every_backend
@pytest.mark.parametrize("split", [1, 37, 64])
def test_states_carry_from_call_to_call(device, backend, split):
    skip_without(backend, device)

    def in_two_passes(r, k, v, w, u, state):
        rows = (r, k, v, w)
        y_1, state = wkv6(*(x[:, :split] for x in rows), u, state, backend=backend)
        y_2, state = wkv6(*(x[:, split:] for x in rows), u, state, backend=backend)
        return torch.cat((y_1, y_2), dim=1), state

    check(device, backend, make_inputs(B=2, T=129, H=2, N=64), torch.bfloat16, in_two_passes)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [32, 64, 128])
@pytest.mark.usefixtures("poisoned_memory")
def test_native_gives_the_same_bits_every_time(device, dtype, N):
    """All elements are written: memory that is not written is NaN."""
    inputs = [x.to(device) for x in representable(make_inputs(B=2, T=201, H=5, N=N), dtype)]
    grads = [g.to(device) for g in make_output_grads([x.cpu() for x in inputs])]
    first, second = (outputs_and_grads(partial(wkv6, backend="native"), inputs, grads) for _ in range(2))
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), name


@each_device
def test_other_head_sizes_use_torch_if_the_kernels_do_not_support_them(device):
    inputs = [x.to(device) for x in make_inputs(B=1, T=9, H=2, N=48)]
    taken = "torch" if device == "cuda" else "native"
    for found, expected in zip(wkv6(*inputs), wkv6(*inputs, backend=taken), strict=True):
        assert torch.equal(found, expected)
    check(device, "auto", make_inputs(B=2, T=37, H=2, N=48), torch.bfloat16)


def test_the_error_lists_the_head_sizes_of_native_on_cuda():
    rows = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, shape=(1, 9, 2, 48))
    assert wkv6_module._native_obstacle(rows) == "supports head sizes (32, 64, 128) on CUDA; found 48; use torch"
    rows.shape = (1, 9, 2, 64)
    assert wkv6_module._native_obstacle(rows) is None
