"""Every fast backend compared with the float64 reference, for both outputs and all six gradients."""

from functools import partial

import pytest
import torch

from rwkv_peft.ops.wkv6.op import wkv6
from tests.ops.wkv6.wkv6_cases import (
    NAMES,
    assert_close,
    make_inputs,
    make_output_grads,
    outputs_and_grads,
    reference_results,
)

FP32_TOLERANCE = 2e-6
"""The measured error is at most 4e-7 for every output and gradient."""

FAST_BACKENDS = ("native", "torch")

every_backend = pytest.mark.parametrize("backend", FAST_BACKENDS)


@pytest.fixture
def poisoned_memory():
    """Make torch.empty return NaN, so that an element that is never written is noticed."""
    torch.use_deterministic_algorithms(True)  # also switches on torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@every_backend
@pytest.mark.parametrize(
    ("B", "T", "H", "N"),
    [(2, 1, 3, 32), (2, 7, 2, 16), (2, 16, 3, 40), (2, 33, 2, 1), (2, 129, 3, 32), (1, 275, 2, 64), (2, 35, 2, 128)],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_reference(backend, B, T, H, N):
    """Lengths below, at and above the chunk sizes 8, 16 and 128, and any head size."""
    inputs = make_inputs(B, T, H, N)
    grads = make_output_grads(inputs)
    found = outputs_and_grads(partial(wkv6, backend=backend), inputs, grads)
    assert_close(found, reference_results(inputs, grads), FP32_TOLERANCE)


@pytest.mark.parametrize(("threads", "B"), [(2, 3), (64, 1)])
def test_native_is_bitwise_the_same_for_any_number_of_threads(threads, B):
    """With fewer heads than threads, the kernels use narrower tiles."""
    inputs = make_inputs(B=B, T=40, H=1, N=64)
    grads = make_output_grads(inputs)
    native = partial(wkv6, backend="native")
    on_one_thread = outputs_and_grads(native, inputs, grads)
    torch.set_num_threads(threads)
    found = outputs_and_grads(native, inputs, grads)
    assert all(torch.equal(found[name], on_one_thread[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.bfloat16), ("native", torch.float16), ("torch", torch.bfloat16)]
)
def test_low_precision_is_rounded_once(backend, dtype):
    """Computed in fp32: y and the gradients of r, k, v are rounded once, and the other results are not rounded."""
    inputs = make_inputs(B=2, T=65, H=2, N=32, dtype=dtype)
    grads = make_output_grads(inputs)
    found = outputs_and_grads(partial(wkv6, backend=backend), inputs, grads)
    expected = reference_results(inputs, grads)

    rounded = ("y", "grad_r", "grad_k", "grad_v")
    assert {name: found[name].dtype for name in NAMES} == {
        name: dtype if name in rounded else torch.float32 for name in NAMES
    }
    assert_close(found, {name: expected[name] for name in rounded}, torch.finfo(dtype).eps / 2)
    assert_close(found, {name: expected[name] for name in NAMES if name not in rounded}, FP32_TOLERANCE)


def test_w_and_u_may_have_the_dtype_of_r():
    inputs = [*make_inputs(B=1, T=20, H=2, N=32, dtype=torch.bfloat16)]
    inputs[3], inputs[4] = inputs[3].bfloat16(), inputs[4].bfloat16()
    grads = make_output_grads(inputs)
    found = outputs_and_grads(wkv6, inputs, grads)
    assert found["grad_w"].dtype == found["grad_u"].dtype == torch.bfloat16
    assert_close(found, reference_results(inputs, grads), 4e-3)


@every_backend
def test_strided_inputs(backend):
    """Views as in a model: slices of one projection, a state expanded over the batch, and a broadcast gradient."""
    B, T, H, N = 2, 21, 2, 32
    packed = torch.randn(B, T, 3, H, N)
    state = torch.randn(H, N, N).expand(B, H, N, N)
    w, u = (torch.randn(B, N, H, T) - 1).permute(0, 3, 2, 1), torch.randn(N, H).T
    inputs = (*packed.unbind(2), w, u, state)
    assert not any(x.is_contiguous() for x in inputs)
    grads = (torch.randn(B, T, 1, 1).expand(B, T, H, N), torch.randn(()).expand(B, H, N, N))
    found = outputs_and_grads(partial(wkv6, backend=backend), inputs, grads)
    assert_close(found, reference_results(inputs, grads), FP32_TOLERANCE)


@every_backend
@pytest.mark.parametrize("split", [1, 37])
def test_split_with_carried_state_equals_one_pass(backend, split):
    def in_two_passes(r, k, v, w, u, state):
        rows = (r, k, v, w)
        y_1, state = wkv6(*(x[:, :split] for x in rows), u, state, backend=backend)
        y_2, state = wkv6(*(x[:, split:] for x in rows), u, state, backend=backend)
        return torch.cat((y_1, y_2), dim=1), state

    inputs = make_inputs(B=2, T=70, H=2, N=32)
    grads = make_output_grads(inputs)
    one_pass = outputs_and_grads(partial(wkv6, backend=backend), inputs, grads)
    assert_close(outputs_and_grads(in_two_passes, inputs, grads), one_pass, FP32_TOLERANCE)


@every_backend
def test_extreme_decays_inside_a_chunk(backend):
    """A decay of 0 (reset) or 1 (hold) gives finite results and does not affect the precision of other tokens."""
    w_values = torch.tensor([-1000.0, -20.0, 5.0, 10.0, 20.0, 1000.0]).view(6, 1, 1)
    inputs = make_inputs(B=6, T=40, H=2, N=32)  # one value per sequence
    inputs[3][:, 13] = w_values
    inputs[3][:, 20:23, :, ::2] = w_values[..., None]
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    expected["grad_w"] = expected["grad_w"].nan_to_num()  # inf * 0 in the reference at w = 1000; the limit is 0
    assert_close(outputs_and_grads(partial(wkv6, backend=backend), inputs, grads), expected, FP32_TOLERANCE)


def test_no_state_is_a_state_of_zeros():
    *rows, u, state = make_inputs(B=2, T=9, H=2, N=32)
    y, last = wkv6(*rows, u)
    y_zeros, last_zeros = wkv6(*rows, u, torch.zeros_like(state))
    assert torch.equal(y, y_zeros)
    assert torch.equal(last, last_zeros)


@every_backend
def test_one_trainable_input(backend):
    """State tuning trains only the state. Here only y has a gradient, and no input is modified."""
    inputs = make_inputs(B=1, T=10, H=2, N=32)
    grads = make_output_grads(inputs)
    expected = outputs_and_grads(partial(wkv6, backend=backend), inputs, (grads[0], torch.zeros_like(grads[1])))
    for trained in range(6):
        leaves = [x.clone().requires_grad_(i == trained) for i, x in enumerate(inputs)]
        y, _ = wkv6(*leaves, backend=backend)
        y.backward(grads[0])
        assert [x.grad is not None for x in leaves] == [i == trained for i in range(6)]
        assert torch.equal(leaves[trained].grad, expected[NAMES[2 + trained]])
        assert all(torch.equal(leaf, x) for leaf, x in zip(leaves, inputs, strict=True))


@every_backend
def test_only_the_last_state_is_used(backend):
    inputs = make_inputs(B=1, T=10, H=2, N=32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    wkv6(*leaves, backend=backend)[1].sum().backward()
    expected = reference_results(inputs, (torch.zeros_like(inputs[0]), torch.ones_like(inputs[5])))
    found = dict(zip(NAMES[2:], (x.grad for x in leaves), strict=True))
    reached = ("grad_k", "grad_v", "grad_w", "grad_state")  # the state does not depend on r and u
    assert_close(found, {name: expected[name] for name in reached}, FP32_TOLERANCE)
