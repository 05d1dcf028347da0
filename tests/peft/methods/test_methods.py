"""What every method with layers must hold, as a layer; in a whole model: test_methods_in_a_model.py.

A new method is tested by adding it to the registry and to CASES.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.peft.injection import inject, peft_layers
from rwkv_peft.peft.registry import METHODS
from tests.helpers import relative_error
from tests.peft import definitions
from tests.peft.cases import CASES, MODEL_CASES
from tests.peft.definitions import (
    MERGEABLE,
    MERGEABLE_NAMES,
    NAMES,
    SHAPES,
    copies,
    gradients_of,
    make_layer,
    make_linear,
    train_a_little,
    trained_of,
)

every_case = pytest.mark.parametrize(("method", "options"), CASES, ids=NAMES)
every_mergeable_case = pytest.mark.parametrize(("method", "options"), MERGEABLE, ids=MERGEABLE_NAMES)


def test_every_registered_method_is_tested():
    assert {name for name, _ in CASES} == {name for name, method in METHODS.items() if method.layer}
    assert {name for name, _ in MODEL_CASES} == {name for name, method in METHODS.items() if not method.layer}


@every_case
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_identity_at_init(method, options, shape, bias):
    base = make_linear(shape, bias=bias)
    layer = make_layer(method, options, base)
    assert layer.identity_at_init
    x = torch.randn(3, shape[1], dtype=torch.float64)
    limit = 1e-12 if layer.initial_names else 1e-14  # a derived weight is rounded
    torch.testing.assert_close(layer.eval()(x), base(x), rtol=0, atol=limit)
    if layer.initial_names:
        assert relative_error(layer.weight, base.weight) > 1e-2, "the frozen weight is what the factors leave"


@every_case
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_the_definition(method, options, shape, bias):
    base = make_linear(shape, bias=bias)
    layer = make_layer(method, options, base).eval()  # without dropout
    start = copies(trained_of(layer))
    train_a_little(layer)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, shape[0], dtype=torch.float64)
    p = trained_of(layer)
    fast, slow = layer(x), definitions.output(method, options, x, base.weight.detach(), base.bias, p, start)
    assert relative_error(fast, slow) < 1e-12
    assert relative_error(base(x), slow) > 1e-2, "the adapter must do something for this test to mean anything"
    inputs = (x, *p.values())
    pairs = zip(torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(slow, inputs, grad), strict=True)
    for name, (a, b) in zip(("x", *p), pairs, strict=True):
        assert b.norm() > 0, name
        assert relative_error(a, b) < 1e-12, name


@every_mergeable_case
@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrices_it_names_are_the_definitions(method, options, shape):
    """The delta of the original weight, what the layer multiplies with, and what a merge writes."""
    base = make_linear(shape)
    layer = make_layer(method, options, base)
    start = copies(trained_of(layer))
    train_a_little(layer)
    original = base.weight.detach()
    exact = definitions.matrix(method, options, original, trained_of(layer), start)
    assert relative_error(original + layer.delta_weight(original), exact) < 1e-12
    assert relative_error(layer.effective_weight(), exact) < 1e-12
    assert relative_error(layer.merged_weight(original), exact) < 1e-12
    assert not layer.merged_weight(original).requires_grad
    inputs, grad = list(trained_of(layer).values()), torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(exact, inputs, grad)
    for found in (layer.delta_weight(original), layer.effective_weight()):
        gradients = torch.autograd.grad(found, inputs, grad)
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(gradients, expected, strict=True))


@every_mergeable_case
def test_merged_equals_unmerged(method, options):
    base = make_linear((96, 64), bias=True, dtype=torch.float32)
    layer = make_layer(method, options, base).eval()
    train_a_little(layer)
    x = torch.randn(7, 64)
    merged = F.linear(x, layer.merged_weight(base.weight), base.bias)
    assert relative_error(merged, layer(x)) < 1e-5
    assert relative_error(base(x), layer(x)) > 1e-2, "the adapter must do something for this test to mean anything"


@every_mergeable_case
@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_merged_equals_unmerged_in_bf16(method, options, size):
    """Both err at most twice as much as the best that bf16 can do: the exact matrix, rounded, in a bf16 product."""
    base = make_linear((96, 64), dtype=torch.bfloat16)
    layer = make_layer(method, options, base, torch.float32).eval()
    start = {name: tensor.double() for name, tensor in copies(trained_of(layer)).items()}
    train_a_little(layer, size)
    p = {name: tensor.detach().double() for name, tensor in trained_of(layer).items()}
    exact_matrix = definitions.matrix(method, options, base.weight.detach().double(), p, start)
    x = torch.randn(512, 64).bfloat16()
    exact = x.double() @ exact_matrix.T
    plain = relative_error(F.linear(x, exact_matrix.bfloat16()), exact)
    with torch.no_grad():
        assert relative_error(layer(x), exact) < 2 * plain
    merged = layer.merged_weight(base.weight)
    assert merged.dtype == torch.float32, "the caller rounds, once"
    assert relative_error(F.linear(x, merged.bfloat16()), exact) < 2 * plain


def test_adapter_layers_cannot_be_merged():
    assert [method for method, _ in CASES if not METHODS[method].layer.mergeable] == ["adapter"]


@every_case
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "x_dtype"),
    [
        (torch.bfloat16, "fp32", torch.bfloat16),
        (torch.bfloat16, "bf16", torch.bfloat16),
        (torch.float32, "fp32", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
)
def test_dtypes_mix(method, options, base_dtype, adapter_dtype, x_dtype, autocast):
    """Output in x's dtype, gradients in the parameters', both near the definition in float64 on the same numbers."""
    base = make_linear((96, 64), bias=True, dtype=base_dtype)
    model = nn.Sequential(copy.deepcopy(base))
    peft = PeftConfig(peft=method, peft_config=options, peft_targets=("0",), adapter_dtype=adapter_dtype)
    inject(model, peft, gradients=gradients_of(model))
    layer = model.eval()[0]
    start = {name: tensor.double() for name, tensor in copies(trained_of(layer)).items()}
    train_a_little(model)
    expected = torch.float32 if adapter_dtype == "fp32" else torch.bfloat16
    assert {tensor.dtype for tensor in trained_of(layer).values()} == {expected}
    assert layer.weight.dtype == base_dtype
    x, grad = torch.randn(100, 64).to(x_dtype).requires_grad_(), torch.randn(100, 96).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == x_dtype
    inputs = (x, *trained_of(layer).values())
    found = torch.autograd.grad(y, inputs, grad)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    p = dict(zip(layer.adapter_names, exact_inputs[1:], strict=True))
    weight, bias = base.weight.detach().double(), base.bias.detach().double()
    exact = definitions.output(method, options, exact_inputs[0], weight, bias, p, start)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    for name, a, b in zip(("y", "x", *p), (y, *found), (exact, *exact_gradients), strict=True):
        assert a.dtype == (expected if name in p else x_dtype), name
        assert relative_error(a, b) < 1.5e-2, name


@every_case
def test_the_weight_gets_no_gradient(method, options):
    model = nn.Sequential(make_linear((96, 64), bias=True, dtype=torch.float32))
    inject(
        model,
        PeftConfig(peft=method, peft_config=options, peft_targets=("0",)),
        gradients=gradients_of(model),
    )
    model(torch.randn(3, 64)).sum().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is None
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"0.{name}" for name in peft_layers(model)["0"].adapter_names
    }


def test_pissa_starts_from_the_largest_singular_vectors():
    """A = sqrt(S) V^T and B = U sqrt(S); the fast SVD is near on a spectrum that falls."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 64, dtype=torch.float64))[0] for n in (96, 64))
    s = 2.0 ** -torch.arange(64, dtype=torch.float64)
    base = make_linear((96, 64))
    with torch.no_grad():
        base.weight.copy_(u * s @ v.T)
    for niter, limit in ((0, 1e-10), (4, 1e-6)):
        layer = make_layer("pissa", {"r": 4, "svd_niter": niter}, base)
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        assert relative_error(a @ a.T, s[:4].diag()) < limit
        assert relative_error(b.T @ b, s[:4].diag()) < limit
        assert relative_error(b @ a, (u * s)[:, :4] @ v[:, :4].T) < limit
        assert relative_error(layer.weight, (u * s)[:, 4:] @ v[:, 4:].T) < 10 * limit


def test_olora_starts_from_orthonormal_columns():
    """B = Q[:, :r], A = R[:r]: what they leave of W has no part along B, and its first r columns are empty."""
    base = make_linear((96, 64))
    layer = make_layer("olora", {"r": 4}, base)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    assert relative_error(b.T @ b, torch.eye(4, dtype=torch.float64)) < 1e-12
    assert a[:, :4].tril(-1).norm() < 1e-12
    assert (b.T @ layer.weight).norm() < 1e-12
    assert layer.weight[:, :4].norm() < 1e-12


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_starts_at_random_with_b_at_zero(method):
    """Kaiming's uniform start as in LoRA's code: A within 1 / sqrt(I); DoRA's magnitudes are the rows' lengths."""
    layer = make_layer(method, {"r": 16}, make_linear((96, 64)))
    assert layer.lora_B.abs().max() == 0
    assert 0.9 / 8 < layer.lora_A.abs().max() <= 1 / 8
    assert layer.lora_A.detach().std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    if method == "dora":
        assert relative_error(layer.lora_magnitude, layer.weight.norm(dim=1)) < 1e-12


def test_adapter_layers_start_with_no_way_up():
    layer = make_layer("adapter", {"r": 8}, make_linear((96, 64)))
    assert layer.adapter_up.abs().max() == 0
    assert layer.adapter_down.abs().min() > 0


LOW_RANK = ["lora", "dora", "pissa", "olora", "lora_ga"]


@pytest.mark.parametrize("method", LOW_RANK)
def test_dropout_is_on_in_training_only(method):
    """Off: the layer without it. On: other numbers each time, whose mean is the layer without it."""
    options = {"r": 4, "dropout": 0.5}
    layer = make_layer(method, options, make_linear((96, 64)))
    plain = make_layer(method, {"r": 4}, make_linear((96, 64)))
    train_a_little(layer)
    train_a_little(plain)
    x = torch.randn(9, 64, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert torch.equal(plain.train()(x), plain.eval()(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        mean = layer(x.expand(4000, 9, 64)).mean(0)
        noise = (layer(x) - plain(x)).norm() / 4000**0.5
        assert (mean - plain(x)).norm() < 3 * noise


def test_low_rank_methods_have_dropout():
    assert {name for name, method in METHODS.items() if hasattr(method.config, "dropout")} == set(LOW_RANK)
