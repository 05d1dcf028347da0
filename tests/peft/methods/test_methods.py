"""Checks of every method with layers, as a single layer; in a whole model: test_methods_in_a_model.py.

A new method is tested by adding it to `cases.CASES`, with its definition in definitions.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv_peft.config.method import METHODS
from rwkv_peft.peft.injection import inject
from rwkv_peft.peft.registry import method_config, method_named
from tests.helpers import relative_error
from tests.peft import definitions
from tests.peft.cases import CASES, MODEL_CASES, VARIANTS
from tests.peft.definitions import (
    SHAPES,
    copies,
    gradients_of,
    is_mergeable,
    make_layer,
    make_linear,
    name_of,
    train_a_little,
    trained_of,
)

ALL = [*CASES, *VARIANTS]
every_variant = pytest.mark.parametrize(("method", "options"), ALL, ids=map(name_of, ALL))
MERGEABLE = [case for case in ALL if is_mergeable(case)]
every_mergeable_variant = pytest.mark.parametrize(("method", "options"), MERGEABLE, ids=map(name_of, MERGEABLE))


def test_every_registered_method_is_tested():
    assert {name for name, _ in CASES} == {name for name in METHODS if method_named(name).layer}
    assert {name for name, _ in MODEL_CASES} == {name for name in METHODS if not method_named(name).layer}


@every_variant
def test_is_the_identity_at_init(method, options):
    for shape, bias in zip(SHAPES, (False, True, True), strict=True):
        base = make_linear(shape, bias=bias)
        layer = make_layer(method, options, base)
        assert layer.identity_at_init
        x = torch.randn(3, shape[1], dtype=torch.float64)
        limit = 1e-12 if layer.initial_names else 1e-14  # a derived weight is rounded
        torch.testing.assert_close(layer.eval()(x), base(x), rtol=0, atol=limit)
        if layer.initial_names:
            assert relative_error(layer.weight, base.weight) > 1e-2, "the frozen weight is the residual"


@every_variant
def test_output_and_gradients_equal_the_definition(method, options):
    for shape, bias in zip(SHAPES, (False, True, True), strict=True):
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


@every_mergeable_variant
def test_the_matrices_of_a_layer_equal_the_definition(method, options):
    """The delta of the original weight, the matrix that the layer multiplies with, and the one that a merge writes."""
    for shape in SHAPES[:2]:
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


@every_mergeable_variant
def test_merged_equals_unmerged_in_bf16(method, options):
    """Both err at most twice as much as the best that bf16 can do: the exact matrix, rounded, in a bf16 product."""
    for size in (1e-3, 0.1):
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


@every_variant
def test_dtypes_mix(method, options):
    """Output in x's dtype, gradients in the parameters', both near the definition in float64 on the same values."""
    for base_dtype, adapter_dtype, x_dtype, autocast in (
        (torch.bfloat16, torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, torch.float32, True),
    ):
        base = make_linear((96, 64), bias=True, dtype=base_dtype)
        model = nn.Sequential(copy.deepcopy(base))
        config = method_config(method, options)
        inject(model, config, ("0",), adapter_dtype=adapter_dtype, gradients=gradients_of(model))
        layer = model.eval()[0]
        start = {name: tensor.double() for name, tensor in copies(trained_of(layer)).items()}
        train_a_little(model)
        assert {tensor.dtype for tensor in trained_of(layer).values()} == {adapter_dtype}
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
            assert a.dtype == (adapter_dtype if name in p else x_dtype), name
            assert relative_error(a, b) < 1.5e-2, name


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
    """B = Q[:, :r], A = R[:r]: the residual W - B A has no part along B, and its first r columns are zero."""
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


def test_adapter_layers_start_with_a_zero_up_projection():
    layer = make_layer("adapter", {"r": 8}, make_linear((96, 64)))
    assert layer.adapter_up.abs().max() == 0
    assert layer.adapter_down.abs().min() > 0


WITH_DROPOUT = [name for name in METHODS if hasattr(method_named(name).config, "dropout")]


def test_dropout_is_an_option_of_the_low_rank_methods():
    assert {"lora", "dora", "pissa", "olora", "lora_ga"} <= set(WITH_DROPOUT)


@pytest.mark.parametrize("method", WITH_DROPOUT)
def test_dropout_is_on_in_training_only(method):
    """Off: the layer without it. On: a different output each time, whose mean is the layer without it."""
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
        mean = layer(x.expand(1000, 9, 64)).mean(0)
        noise = (layer(x) - plain(x)).norm() / 1000**0.5
        assert (mean - plain(x)).norm() < 3 * noise
