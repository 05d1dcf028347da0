"""The fla backend without fla and without a GPU: a stand-in computes the recurrence from fla's arguments."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from rwkv_peft.errors import UserError
from rwkv_peft.ops.wkv6 import fla as wkv6_fla
from rwkv_peft.ops.wkv6 import op as wkv6_module
from rwkv_peft.ops.wkv6.op import active_backend, wkv6
from tests.ops.wkv6.wkv6_cases import assert_close, make_inputs, make_output_grads, outputs_and_grads, reference_results

FP32_TOLERANCE = 2e-6

fla_backend = partial(wkv6, backend="fla")


def stand_in_chunk_rwkv6(
    r,
    k,
    v,
    w,
    u,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    **kwargs,
):
    """Has the signature of fla 0.6.0's function: rows (B, T, H, K), w = log(decay), state (B, H, K, V).

    Follows the definition in fla/ops/rwkv6/recurrent_naive.py, and checks what the kernels assume without checking.
    """
    assert cu_seqlens is None
    assert cu_seqlens_cpu is None
    assert not kwargs
    B, T, H, K = r.shape
    assert initial_state.shape == (B, H, K, K)
    assert initial_state.dtype == w.dtype == torch.float32
    assert w.isfinite().all()
    scale = K**-0.5 if scale is None else scale
    q, keys, values, decay, bonus = (x.float() for x in (r, k, v, w.exp(), u))
    h = initial_state
    out = []
    for t in range(T):
        kv = keys[:, t, :, :, None] * values[:, t, :, None, :]  # (B, H, K, V)
        out.append(((h + bonus[None, :, :, None] * kv) * (scale * q[:, t, :, :, None])).sum(-2))
        h = h * decay[:, t, :, :, None] + kv
    return torch.stack(out, dim=1).to(r.dtype), h if output_final_state else None


@pytest.fixture
def fla(monkeypatch):
    """Provide an importable package fla that runs on the CPU."""
    wkv6_fla._chunk_rwkv6.cache_clear()
    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.rwkv6")}
    modules["fla.ops.rwkv6"].chunk_rwkv6 = stand_in_chunk_rwkv6
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(wkv6_fla, "DEVICE_TYPES", ("cpu",))
    yield
    wkv6_fla._chunk_rwkv6.cache_clear()


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_arguments_give_the_recurrence(dtype):
    inputs = make_inputs(B=2, T=7, H=3, N=32, dtype=dtype)
    grads = make_output_grads(inputs)
    found = outputs_and_grads(fla_backend, inputs, grads)
    assert found["y"].dtype == dtype
    assert found["state_out"].dtype == torch.float32
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_close(found, reference_results(inputs, grads), tolerance)


@pytest.mark.usefixtures("fla")
def test_no_state_is_a_state_of_zeros():
    *rows, u, state = make_inputs(B=2, T=5, H=2, N=32)
    for found, expected in zip(fla_backend(*rows, u), fla_backend(*rows, u, torch.zeros_like(state)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("fla")
def test_extreme_decays_are_passed_as_finite_logarithms():
    inputs = make_inputs(B=4, T=9, H=2, N=32)  # one value per sequence
    inputs[3][:, 4] = torch.tensor([-1000.0, 5.0, 20.0, 1000.0]).view(4, 1, 1)
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    expected["grad_w"] = expected["grad_w"].nan_to_num()  # inf * 0 in the reference at w = 1000; the limit is 0
    assert_close(outputs_and_grads(fla_backend, inputs, grads), expected, FP32_TOLERANCE)


@pytest.mark.usefixtures("fla")
def test_float64_is_refused():
    inputs = [x.double() for x in make_inputs(B=1, T=3, H=1, N=32)]
    with pytest.raises(ValueError, match="fla does not support float64"):
        fla_backend(*inputs)


@pytest.mark.usefixtures("fla")
def test_auto_never_uses_fla(monkeypatch):
    monkeypatch.setattr(wkv6_module, "load_native", lambda device_type: "no compiler")
    wkv6_module._automatic.cache_clear()
    assert active_backend("cpu").backend == "torch"
    assert active_backend("cpu", "fla").backend == "fla"
    wkv6_module._automatic.cache_clear()


def test_on_the_cpu_the_error_asks_for_a_gpu():
    with pytest.raises(UserError) as error:
        fla_backend(*make_inputs(B=1, T=3, H=2, N=4))
    assert str(error.value) == (
        "wkv6 backend fla: flash-linear-attention needs a CUDA device; found cpu. Use backend native, torch or auto."
    )


def test_the_error_names_the_missing_package(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'fla'", name="fla")

    wkv6_fla._chunk_rwkv6.cache_clear()
    monkeypatch.setattr(wkv6_fla.importlib, "import_module", import_module)
    assert (
        wkv6_fla.load_fla("cuda")
        == "the package flash-linear-attention is not installed (pip install flash-linear-attention)"
    )


@pytest.mark.usefixtures("fla")
def test_the_error_reports_a_failed_import_of_fla(monkeypatch):
    """For example if PyTorch was installed without Triton."""
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", None)
    assert wkv6_fla.load_fla("cpu").startswith("flash-linear-attention cannot be imported: ")
