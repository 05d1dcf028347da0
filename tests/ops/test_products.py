"""Products with a frozen matrix compared with torch, and the LoRA product compared with its definition."""

from __future__ import annotations

import pytest
import torch

from rwkv_peft.ops import products
from rwkv_peft.ops.low_rank import lora_linear
from rwkv_peft.ops.products import linear, product_dtype, times, times_transposed, weight_slices
from tests.helpers import relative_error


@pytest.mark.parametrize("amx", [True, False])
def test_bf16_rows_are_widened_without_amx(monkeypatch, amx):
    monkeypatch.setattr(products, "_has_amx", lambda: amx)
    many, few = torch.zeros(products.ROWS_WORTH_WIDENING, 8).bfloat16(), torch.zeros(4, 8).bfloat16()
    assert product_dtype(many) == (torch.bfloat16 if amx else torch.float32)
    assert product_dtype(few) == product_dtype(many), "updates must not be lost to rounding, even with few rows"
    with torch.no_grad():
        assert product_dtype(few) == torch.bfloat16
    assert product_dtype(many.float()) == torch.float32
    assert product_dtype(many.to("meta")) == torch.bfloat16


@pytest.mark.parametrize(("elements", "dtype"), [(64, torch.bfloat16), (1000, torch.float16), (2**21, torch.bfloat16)])
def test_slices_of_any_size_give_the_same_product(monkeypatch, elements, dtype):
    monkeypatch.setattr(products, "weight_slices", lambda weight: weight_slices(weight, elements=elements))
    torch.manual_seed(0)
    weight, x, y = torch.randn(96, 64).to(dtype), torch.randn(5, 64), torch.randn(5, 96)
    assert relative_error(times_transposed(x, weight), x.double() @ weight.double().mT) < 1e-6
    assert relative_error(times(y, weight), y.double() @ weight.double()) < 1e-6


def test_slices_cover_the_rows_at_multiples():
    slices = list(weight_slices(torch.empty(96, 64), multiple=16, elements=2000))
    assert [(s.start, s.stop) for s in slices] == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 96)]


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "amx", "rows"),
    [
        (torch.float32, torch.float32, False, (7,)),
        (torch.float32, torch.bfloat16, True, (2, 50)),
        (torch.bfloat16, torch.float32, False, ()),
        (torch.bfloat16, torch.float32, True, (7,)),
        (torch.bfloat16, torch.bfloat16, False, (2, 50)),
        (torch.bfloat16, torch.bfloat16, True, ()),
    ],
)
def test_linear_and_its_gradients(monkeypatch, x_dtype, weight_dtype, amx, rows):
    monkeypatch.setattr(products, "_has_amx", lambda: amx)
    torch.manual_seed(0)
    x = torch.randn(*rows, 64).to(x_dtype).requires_grad_()
    weight = (torch.randn(96, 64) / 8).to(weight_dtype).requires_grad_()
    y = linear(x, weight)
    grad = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    reference = exact[0] @ exact[1].mT
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, weight), grad)),
        (reference, *torch.autograd.grad(reference, exact, grad.double())),
        strict=True,
    )
    limit = 1e-6 if x_dtype == weight_dtype == torch.float32 else 6e-3
    assert y.dtype == x_dtype
    assert all(relative_error(a, b) < limit for a, b in pairs)


@pytest.mark.parametrize(
    ("dtype", "amx"),
    [(torch.float64, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_lora_and_its_gradients(monkeypatch, dtype, amx):
    monkeypatch.setattr(products, "_has_amx", lambda: amx)
    torch.manual_seed(0)
    x, weight = torch.randn(4, 30, 64).to(dtype).requires_grad_(), (torch.randn(96, 64) / 8).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = ((torch.randn(size) / 8).to(wide).requires_grad_() for size in ((4, 64), (96, 4)))
    y = lora_linear(x, weight, a, b, 0.5)
    grad = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    reference = exact[0] @ (weight.double() + 0.5 * exact[2] @ exact[1]).mT
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, a, b), grad)),
        (reference, *torch.autograd.grad(reference, exact, grad.double())),
        strict=True,
    )
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert all(relative_error(fast, slow) < limit for fast, slow in pairs)


def test_lora_saves_only_its_input_and_the_low_rank_product():
    saved = []
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(96, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        lora_linear(x, weight, a, b, 1.0)
    assert sorted(saved) == sorted([(32, 64), (4, 64), (96, 4), (32, 4)])


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "amx"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_autocast_changes_nothing(monkeypatch, x_dtype, weight_dtype, amx):
    monkeypatch.setattr(products, "_has_amx", lambda: amx)
    torch.manual_seed(0)
    x, weight = torch.randn(80, 64).to(x_dtype).requires_grad_(), torch.randn(96, 64).to(weight_dtype)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)

    def run():
        y = lora_linear(x, weight, a, b, 1.0)
        return (y, *torch.autograd.grad(y.float().sum(), (x, a, b)))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(plain, run(), strict=True))


def test_second_derivatives_are_refused():
    x, weight = torch.randn(80, 64, requires_grad=True), torch.randn(96, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    (first,) = torch.autograd.grad(lora_linear(x, weight, a, b, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
