"""What every registered method must hold. A new method is tested by adding it to the registry and to CASES."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.adapter_io import AdapterInfo, load_trained, read_adapter, save_adapter, trained_state
from rwkv_peft.peft.inject import inject, mark_trainable, peft_layers
from rwkv_peft.peft.registry import METHODS, layer_class, method_config
from tests.helpers import relative_error

CASES = [
    ("bone", {"r": 16, "mode": "row"}),
    ("bone", {"r": 16, "mode": "col"}),
    ("bone", {"r": 16, "mode": "left"}),
    ("lora", {"r": 4, "alpha": 8.0}),
]
SHAPES = [(96, 64), (64, 224), (64, 64)]


def test_every_registered_method_is_tested():
    with_layers = {name for name in METHODS if layer_class(name)}
    assert {name for name, _ in CASES} == with_layers


def linear(out_features: int, in_features: int, *, bias: bool = False, dtype=torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def layer_of(method: str, options: dict, base: nn.Linear, *, trained: bool = True):
    layer = layer_class(method)(base, method_config(method, options), dtype=base.weight.dtype)
    layer.weight.requires_grad_(False)
    if trained:
        torch.manual_seed(1)
        for name in layer.adapter_names:
            nn.init.normal_(getattr(layer, name), std=0.1)
    return layer


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_identity_at_init(method, options, shape):
    base = linear(*shape)
    x = torch.randn(3, shape[1], dtype=torch.float64)
    layer = layer_of(method, options, base, trained=False)
    assert layer.identity_at_init
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_the_materialised_definition(method, options, shape, bias):
    """The layer's own forward against W + delta_weight() built in full, in float64."""
    base = linear(*shape, bias=bias)
    layer = layer_of(method, options, base)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, shape[0], dtype=torch.float64)
    inputs = (x, *(getattr(layer, name) for name in layer.adapter_names))
    fast = layer(x)
    slow = nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias)
    assert relative_error(fast, slow) < 1e-12
    names = ("x", *layer.adapter_names)
    for name, a, b in zip(
        names, torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(slow, inputs, grad), strict=True
    ):
        assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize(("method", "options"), CASES)
def test_merged_equals_unmerged(method, options):
    base = linear(96, 64, dtype=torch.float32)
    layer = layer_of(method, options, base)
    x = torch.randn(7, 64)
    assert relative_error(x @ layer.merged_weight().T, layer(x)) < 1e-5
    assert relative_error(base(x), layer(x)) > 1e-2, "the adapter must do something for this test to mean anything"


@pytest.mark.parametrize(("method", "options"), CASES)
def test_bf16_base_keeps_fp32_adapters(method, options):
    model = nn.Sequential(nn.Linear(64, 96, bias=False, dtype=torch.bfloat16))
    inject(model, method, method_config(method, options), targets=["0"])
    trained = mark_trainable(model, method)
    layer = peft_layers(model)["0"]
    assert trained == [f"0.{name}" for name in layer.adapter_names]
    assert all(getattr(layer, name).dtype == torch.float32 for name in layer.adapter_names)
    y = model(torch.randn(3, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is None
    assert all(getattr(layer, name).grad.dtype == torch.float32 for name in layer.adapter_names)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_save_and_load_round_trip(method, options, tmp_path):
    def make() -> nn.Module:
        model = nn.Sequential(linear(96, 64, dtype=torch.float32))
        inject(model, method, method_config(method, options), targets=["0"])
        mark_trainable(model, method)
        return model

    first, second = make(), make()
    for name in peft_layers(first)["0"].adapter_names:
        nn.init.normal_(getattr(peft_layers(first)["0"], name))
    info = AdapterInfo(
        method=method,
        options=options,
        targets=["0"],
        fingerprint={"shapes": "x", "dtypes": ["float32"], "samples": [[1.0]]},
    )
    save_adapter(tmp_path / "a.safetensors", trained_state(first), info)
    tensors, read = read_adapter(tmp_path / "a.safetensors")
    assert read == info
    assert set(tensors) == {f"0.{name}" for name in layer_class(method).adapter_names}
    load_trained(second, tensors, "a.safetensors")
    x = torch.randn(3, 64)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("method", [name for name in METHODS if layer_class(name)])
def test_unknown_key_names_the_nearest(method):
    with pytest.raises(ConfigError, match=rf"--{method}_config rr: unknown key.*Did you mean r\?"):
        method_config(method, {"rr": 8})


@pytest.mark.parametrize("method", [name for name in METHODS if layer_class(name)])
@pytest.mark.parametrize("value", ["64", 0, -1, 2.5, True, None])
def test_bad_r_is_an_error(method, value):
    with pytest.raises(ConfigError, match=rf"--{method}_config r: "):
        method_config(method, {"r": value})
