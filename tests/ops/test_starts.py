"""Rows that hold several texts, compared with the same texts in separate rows, for each operator that looks back."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops.mix import op as mix
from rwkv_peft.ops.mix import reference as mix_reference
from rwkv_peft.ops.mix.native import load_native
from rwkv_peft.ops.wkv6.op import wkv6
from rwkv_peft.ops.wkv6.reference import wkv6_reference
from tests.helpers import relative_error
from tests.ops.mix.test_mix import RANK
from tests.ops.mix.test_mix import make_inputs as mix_inputs
from tests.ops.wkv6.wkv6_cases import NAMES, assert_close, make_inputs, make_output_grads, outputs_and_grads

BACKENDS = ("native", "torch", "reference")
MIXES = ("ddlerp", "shift_lerp")
T = 300
BEGINNINGS = ([0, 1, 2, 8, 29, 64, 77, 128, 129, 200, 255, 256, 257, 299], [15, 16, 17, 127, 250, 298, 299])
"""First tokens of texts in two rows: at chunk boundaries, inside chunks, texts of one token, and the last position. The
second row begins with the rest of an earlier text."""


def make_starts() -> Tensor:
    starts = torch.zeros(2, T, dtype=torch.bool)
    for row, beginnings in enumerate(BEGINNINGS):
        starts[row, beginnings] = True
    return starts


def texts(row: int) -> list[slice]:
    """Return the texts of a row, including the one that continues an earlier row."""
    edges = sorted({0, *BEGINNINGS[row], T})
    return [slice(*edge) for edge in pairwise(edges)]


# --------------------------------------------------------------------------------------------------------------- WKV6


def one_by_one(r, k, v, w, u, state) -> tuple[Tensor, Tensor]:
    """Compute each text separately. If another text follows, the last token's y has no bonus."""
    ys, states = [], []
    for row, carried in enumerate(state.unbind()):
        parts, last = [], None
        for text in texts(row):
            first = carried[None] if text.start not in BEGINNINGS[row] else None
            y, last = wkv6_reference(*(x[row : row + 1, text] for x in (r, k, v, w)), u, first)
            if text.stop < T:
                end = text.stop - 1
                bonus = (r[row, end] * u * k[row, end]).sum(-1, keepdim=True) * v[row, end]  # (H, N)
                y = torch.cat((y[:, :-1], y[:, -1:] - bonus), dim=1)
            parts.append(y)
        ys.append(torch.cat(parts, dim=1))
        states.append(last)
    return torch.cat(ys), torch.cat(states)


def masked_grads(inputs) -> tuple[Tensor, Tensor]:
    """Return gradients that are zero at the last token of each text, whose target is not in the loss."""
    grad_y, grad_state = make_output_grads(inputs)
    grad_y[:, :-1][make_starts()[:, 1:]] = 0
    return grad_y, grad_state


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("native", torch.float32),
        ("native", torch.bfloat16),
        ("torch", torch.float32),
        ("torch", torch.float64),
        ("reference", torch.float64),
    ],
)
def test_wkv6_equals_each_text_alone(backend, dtype):
    """Outputs and all six gradients."""
    inputs = make_inputs(B=2, T=T, H=2, N=16, dtype=dtype)
    if dtype == torch.float64:
        inputs = [x.double() for x in inputs]
    grads = masked_grads(inputs)
    exact = outputs_and_grads(one_by_one, [x.double() for x in inputs], [g.double() for g in grads])
    found = outputs_and_grads(partial(wkv6, starts=make_starts(), backend=backend), inputs, grads)
    assert_close(found, exact, {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wkv6_texts_are_bitwise_independent(backend):
    """Changing every other text and the initial state changes no bit of the remaining texts, nor of their gradients."""
    run = partial(wkv6, starts=make_starts(), backend=backend)
    inputs, others = make_inputs(B=2, T=T, H=2, N=16), make_inputs(B=2, T=T, H=2, N=16, seed=5)
    grads, other_grads = make_output_grads(inputs), make_output_grads(inputs, seed=6)
    for offset in range(2):
        kept = torch.zeros(2, T, dtype=torch.bool)
        for row in range(2):
            for text in texts(row)[2 - offset :: 2]:
                kept[row, text] = True
        choose = kept[..., None, None]
        mixed = [torch.where(choose, x, other) for x, other in zip(inputs[:4], others[:4], strict=True)]
        mixed_grad = torch.where(choose, grads[0], other_grads[0])
        before = outputs_and_grads(run, inputs, grads)
        after = outputs_and_grads(run, (*mixed, inputs[4], others[5]), (mixed_grad, grads[1]))
        for name in ("y", "grad_r", "grad_k", "grad_v", "grad_w"):
            assert torch.equal(after[name][kept], before[name][kept]), name
            assert not torch.equal(after[name][~kept], before[name][~kept]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_token_before_a_start_gets_no_gradient(backend):
    inputs = make_inputs(B=2, T=T, H=1, N=16)
    found = outputs_and_grads(partial(wkv6, starts=make_starts(), backend=backend), inputs, make_output_grads(inputs))
    places = torch.cat((make_starts()[:, 1:], torch.zeros(2, 1, dtype=torch.bool)), dim=1)
    assert found["grad_k"][places].abs().max() == found["grad_w"][places].abs().max() == 0
    assert found["grad_state"][0].abs().max() == 0
    assert found["grad_state"][1].abs().max() > 0
    assert all(found[name].isfinite().all() for name in NAMES)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.float32), ("torch", torch.float64), ("reference", torch.float32)]
)
def test_no_gradient_crosses_a_start(backend, dtype):
    """It is exactly zero, so the decay is exactly zero too."""
    inputs = [x.to(dtype) for x in make_inputs(B=2, T=T, H=1, N=16)]
    start = BEGINNINGS[1][0]
    grad_y, grad_state = (x.to(dtype) for x in make_output_grads(inputs))
    grad_y[1, :start] = 0
    found = outputs_and_grads(partial(wkv6, starts=make_starts(), backend=backend), inputs, (grad_y, grad_state))
    for name in ("grad_r", "grad_k", "grad_v", "grad_w"):
        assert found[name][1, :start].abs().max() == 0, name
        assert found[name][1, start:].abs().max() > 0, name
    assert found["grad_state"][1].abs().max() == 0


def test_wkv6_rejects_starts_of_another_shape_or_dtype():
    inputs = make_inputs(B=2, T=5, H=1, N=16)
    for wrong in (torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"wkv6: starts must be bool \(2, 5\)"):
            wkv6(*inputs, starts=wrong)


# -------------------------------------------------------------------------------------------------------------- mixes


@pytest.fixture
def compiled():
    if reason := load_native():
        pytest.skip(f"no compiled operators: {reason}")


def mixes_one_by_one(name, x, last, *parameters) -> tuple[Tensor, ...]:
    rows = []
    for row in range(2):
        parts = []
        for text in texts(row):
            before = last[row : row + 1] if text.start not in BEGINNINGS[row] else torch.zeros_like(last[:1])
            parts.append(getattr(mix_reference, name)(x[row : row + 1, text], before, *parameters))
        rows.append([torch.cat(one, dim=1) for one in zip(*parts, strict=True)])
    return tuple(torch.cat(one) for one in zip(*rows, strict=True))


def with_gradients(function, inputs, trained=None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(trained is None or i in trained) for i, x in enumerate(inputs)]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    return [*outputs, *(x.grad for x in leaves if x.requires_grad)]


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixes_equal_each_text_alone(name, dtype, compiled):
    """The compiled form in fp32 and bf16, and plain operations in float64."""
    inputs = mix_inputs(name, 2, T, 50, dtype)
    exact = with_gradients(partial(mixes_one_by_one, name), [x.double() for x in inputs])
    found = with_gradients(lambda *tensors: getattr(mix, name)(*tensors, make_starts()), inputs)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
    for i, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        assert relative_error(ours, theirs) < tolerance, i


@pytest.mark.parametrize("name", MIXES)
def test_nan_stays_in_its_text(name, compiled):
    """NaN in one text, also in its gradients, does not change the outputs and gradients of the other texts."""
    inputs = mix_inputs(name, 2, T, 50)
    x = inputs[0]
    x[0, 29:64], inputs[1][0] = float("nan"), float("nan")
    leaves = [each.requires_grad_(i < 2) for i, each in enumerate(inputs)]
    outputs = getattr(mix, name)(*leaves, make_starts())
    torch.autograd.backward(outputs, [torch.where(y.isnan(), y.detach(), torch.ones_like(y)) for y in outputs])
    apart = torch.ones(2, T, dtype=torch.bool)
    apart[0, 29:64] = False
    for found in (*outputs, leaves[0].grad):
        assert found[apart].isfinite().all()
        assert found[~apart].isnan().all()
    assert leaves[1].grad[0].abs().max() == 0
    assert leaves[1].grad[1].abs().max() > 0


@pytest.mark.parametrize(("name", "trained"), [("ddlerp", True), ("shift_lerp", False)])
def test_opcheck_with_starts(name, trained, compiled):
    starts = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)
    inputs = [x.requires_grad_(trained or i == 0) for i, x in enumerate(mix_inputs(name, 2, 5, 48))]
    ops = torch.ops.rwkv_peft
    torch.library.opcheck(getattr(ops, name), (*inputs, starts))
    x, last, *parameters = (each.detach() for each in inputs)
    if name == "ddlerp":
        low_rank = torch.zeros(10, 5 * RANK)
        torch.library.opcheck(ops.ddlerp_backward, (x, last, *parameters, low_rank, *[x] * 5, trained, starts))
    else:
        kept = (x, last) if trained else (None, None)
        torch.library.opcheck(ops.shift_lerp_backward, (*kept, *parameters, x, x, starts))


@pytest.mark.parametrize("name", MIXES)
def test_mixes_reject_starts_of_another_shape_or_dtype(name, compiled):
    inputs = mix_inputs(name, 2, 5, 48)
    for wrong in (torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5)):
        with pytest.raises(RuntimeError, match="starts must be bool of shape"):
            getattr(mix, name)(*inputs, wrong)
