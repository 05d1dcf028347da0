"""The CPU kernels: every instruction set, precision over long sequences, and the step for generation."""

from functools import partial

import pytest
import torch

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.model.init import model_from_scratch
from rwkv_peft.ops.wkv6.native import load_native
from rwkv_peft.ops.wkv6.op import wkv6, wkv6_step
from tests.ops.cpu_levels import each_cpu_level
from tests.ops.wkv6.wkv6_cases import (
    NAMES,
    assert_close,
    make_inputs,
    make_output_grads,
    outputs_and_grads,
    reference_results,
)

native = partial(wkv6, backend="native")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert load_native("cpu") is None


@pytest.mark.parametrize(("B", "T", "H", "N"), [(2, 33, 2, 64), (1, 50, 6, 41), (2, 17, 1, 128)])
def test_every_instruction_set_equals_reference(B, T, H, N):
    inputs = make_inputs(B, T, H, N)
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    for _level in each_cpu_level("wkv6"):
        assert_close(outputs_and_grads(native, inputs, grads), expected, 1e-6)


@pytest.mark.parametrize("N", [41, 64])
def test_every_instruction_set_rounds_bf16_once(N):
    inputs = make_inputs(B=1, T=20, H=2, N=N, dtype=torch.bfloat16)
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    for level in each_cpu_level("wkv6"):
        found = outputs_and_grads(native, inputs, grads)
        for name in ("y", "grad_r", "grad_k", "grad_v"):
            # The nearest bf16 value, except for a few near ties, which fp32 sums may round to the other side.
            assert (found[name] != expected[name].to(torch.bfloat16)).float().mean() < 0.01, (level, name)


def test_bf16_keeps_infinity_and_nan():
    r, k, v, w, u, state = make_inputs(B=1, T=2, H=1, N=64, dtype=torch.bfloat16)
    v[0, 0, 0, 3], v[0, 0, 0, 5] = float("inf"), float("nan")
    for level in each_cpu_level("wkv6"):
        y, _ = native(r, k, v, w, u, state)
        assert (~y[0, 0, 0].isfinite()).nonzero().flatten().tolist() == [3, 5], level
        assert y[0, 0, 0, 3].isinf(), level
        assert y[0, 0, 0, 5].isnan(), level


def test_a_level_that_the_cpu_does_not_support_is_not_selected():
    assert torch.ops.rwkv_peft.wkv6_use_cpu_level("avx1024") == ""


# ----------------------------------------------------------------------------------------------- precision


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_precision_over_4096_tokens_of_a_new_model(layer):
    """The decays are constant, so the rounding error of a decay would accumulate in one direction 4096 times."""
    config = ModelConfig(n_layer=2, n_embd=64, vocab_size=16, head_size=64, dim_att=64, dim_ffn=64).resolved()
    att = model_from_scratch(config, seed=0).blocks[layer].att
    r, k, v, w, u, state = make_inputs(B=1, T=4096, H=1, N=64)
    w, u = att.time_decay.detach().view(1, 1, 1, 64).expand_as(w), att.time_faaaa.detach()
    inputs = (r, k, v, w, u, state)
    grads = make_output_grads(inputs)
    found, expected = outputs_and_grads(native, inputs, grads), reference_results(inputs, grads)
    assert_close(found, {"grad_w": expected.pop("grad_w")}, 5e-6)
    assert_close(found, expected, 1e-6)


def test_precision_with_extreme_decays_over_a_long_sequence():
    """Channels that never forget, channels that forget immediately, and channels that switch between both."""
    inputs = [*make_inputs(B=1, T=1024, H=1, N=64)]
    w = inputs[3]
    w[..., 0:16], w[..., 16:32] = -20.0, 4.0
    w[..., 32:48] = torch.where(torch.arange(1024) % 100 == 99, 4.0, -20.0).view(1, -1, 1, 1)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(native, inputs, grads), reference_results(inputs, grads), 2e-6)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_any_finite_w_gives_finite_results(backend):
    inputs = [*make_inputs(B=6, T=40, H=1, N=16)]  # one value per sequence
    inputs[3][:, ::3] = torch.tensor([-3e38, -1e4, -88.0, 88.0, 1e4, 3e38]).view(6, 1, 1, 1)
    found = outputs_and_grads(partial(wkv6, backend=backend), inputs, make_output_grads(inputs))
    assert all(found[name].isfinite().all() for name in NAMES)


def test_a_decay_of_zero_forgets_everything():
    """Completely, as packed sequences need it."""
    r, k, v, w, u, state = make_inputs(B=1, T=20, H=1, N=64)
    w[:, 10], k[:, 10] = 5.0, 0.0
    y, last = native(r, k, v, w, u, 1e30 * state)
    rest = [x[:, 11:] for x in (r, k, v, w)]
    y_rest, last_rest = native(*rest, u)
    torch.testing.assert_close(y[:, 11:], y_rest)
    torch.testing.assert_close(last, last_rest)


# ----------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(("N", "dtype"), [(41, torch.float32), (41, torch.bfloat16), (64, torch.bfloat16)])
def test_step_equals_one_token(N, dtype):
    *rows, u, state = make_inputs(B=2, T=1, H=3, N=N, dtype=dtype)
    y, after = wkv6(*rows, u, state, backend="native")
    for _level in each_cpu_level("wkv6"):
        overwritten = state.clone()
        torch.testing.assert_close(wkv6_step(*rows, u, overwritten, backend="native"), y)
        torch.testing.assert_close(overwritten, after)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("auto", torch.float32), ("auto", torch.float16), ("torch", torch.float32), ("reference", torch.float16)],
)
def test_step_updates_the_state_under_every_backend(backend, dtype):
    *rows, u, state = make_inputs(B=1, T=1, H=2, N=8, dtype=dtype)
    y, after = wkv6(*rows, u, state, backend=backend)
    strided = state.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (state, strided):
        torch.testing.assert_close(wkv6_step(*rows, u, given, backend=backend), y)
        torch.testing.assert_close(given, after)


def test_step_accepts_one_token_only():
    with pytest.raises(ValueError, match="must have one token"):
        wkv6_step(*make_inputs(B=1, T=2, H=1, N=8))
