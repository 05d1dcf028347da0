"""The quantized frozen matrix: what it stores, what it returns, and every operator on it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops import products
from rwkv_peft.ops.bone.layouts import bone_col, bone_left, bone_materialized, bone_row
from rwkv_peft.ops.low_rank import lora_linear
from rwkv_peft.ops.products import linear
from rwkv_peft.peft import quantization as quant
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.methods.bone import BoneConfig, BoneLinear
from rwkv_peft.peft.methods.lora import LoraConfig, LoraLinear
from rwkv_peft.peft.quantization import KINDS, QuantizedLinear, QuantizedWeight
from tests.helpers import relative_error

BYTES = {"nf4": 0.57, "fp4": 0.57, "int8": 1.1}
"""Bytes for each element, with the scales and the code book."""
ERRORS = {"nf4": (0.088, 0.096), "fp4": (0.116, 0.128), "int8": (0.0085, 0.01)}
"""||W - Q|| / ||W|| of a normal W: 0.092, 0.122 and 0.0095 measured."""


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole(kind):
    """Bit for bit at any width: multiples of a block or not, odd, less than one block."""
    for rows, columns, dtype in (
        (96, 256, torch.float32),
        (40, 224, torch.bfloat16),
        (7, 65, torch.float16),
        (33, 31, torch.float64),
        (5, 1, torch.float32),
        (1, 64, torch.bfloat16),
    ):
        weight = normal(rows, columns, dtype=dtype)
        stored = QuantizedWeight(weight, kind)
        whole = stored[:]
        assert (stored.shape, stored.dtype, stored.device) == (weight.shape, dtype, weight.device)
        assert (whole.shape, whole.dtype) == (weight.shape, dtype)
        for some in (slice(0, 1), slice(rows - 1, rows), slice(rows // 3, rows // 2 + 1), slice(1, 1), slice(2, 99)):
            assert torch.equal(stored[some], whole[some])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_format(kind, dtype):
    weight = normal(512, 1024, dtype=dtype)
    low, high = ERRORS[kind]
    assert low < relative_error(QuantizedWeight(weight, kind)[:], weight) < high


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_quantized_as_the_whole_is(monkeypatch, kind):
    weight = normal(96, 128)
    at_once = QuantizedWeight(weight, kind)
    by_rows = products.weight_slices
    monkeypatch.setattr(quant, "weight_slices", lambda weight: by_rows(weight, elements=1000))
    assert torch.equal(QuantizedWeight(weight, kind)[:], at_once[:])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_columns_of_a_transposed_matrix_survive(kind):
    weight = normal(64, 128).T  # not contiguous
    weight[3:5] = 0
    whole = QuantizedWeight(weight, kind)[:]
    assert (whole[3:5] == 0).all()
    assert relative_error(whole, weight) < 0.13


def quantized(layer: PeftLinear, kind: str) -> PeftLinear:
    layer.replace_weight(QuantizedWeight(layer.weight, kind))
    return layer


def plain(in_features: int, out_features: int, kind: str) -> PeftLinear:
    return quantized(QuantizedLinear(nn.Linear(in_features, out_features), None), kind)


def tensors_held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain attributes of a module and those in it."""
    held = {}
    for path, part in module.named_modules():
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items():
            if isinstance(value, torch.Tensor):
                held[f"{path}.{name}"] = value
    return held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [lambda base: BoneLinear(base, BoneConfig(r=16)), lambda base: QuantizedLinear(base, None)]
)
def test_a_layer_holds_nothing_else_of_that_size(kind, make):
    layer = quantized(make(nn.Linear(512, 1024, bias=False)), kind)
    held = tensors_held(layer)
    assert {name for name, tensor in held.items() if tensor.numel() >= 1024 * 512 / 4} == {"weight.codes"}
    stored = sum(tensor.nbytes for name, tensor in held.items() if name.startswith("weight."))
    assert stored == layer.weight.nbytes <= BYTES[kind] * 1024 * 512
    assert not any(parameter.numel() >= 1024 * 512 for parameter in layer.parameters())


def linear_op(x, weight, trained):
    return linear(x, weight)


def lora(x, weight, trained):
    return lora_linear(x, weight, *trained, 0.5)


def bone(form, *options):
    return lambda x, weight, trained: form(x, weight, *trained, *options)


OPERATORS = {
    "linear": (linear_op, lambda o, i: []),
    "lora": (lora, lambda o, i: [(4, i), (o, 4)]),
    "row": (bone(bone_row), lambda o, i: [(i // 16, 16, 16)]),
    "left": (bone(bone_left), lambda o, i: [(o // 16, 16, 16)]),
    "col": (bone(bone_col), lambda o, i: [(o // 16, 16, 16)]),
    "materialized row": (bone(bone_materialized, "row"), lambda o, i: [(i // 16, 16, 16)]),
    "materialized col": (bone(bone_materialized, "col"), lambda o, i: [(o // 16, 16, 16)]),
}
"""The operator, and the shapes of the trainable parameters."""


def operands(name, out_features, in_features, rows, dtype):
    """x and the trainable parameters, all with gradients."""
    torch.manual_seed(1)
    trained = [(torch.randn(shape) / 10).requires_grad_() for shape in OPERATORS[name][1](out_features, in_features)]
    return torch.randn(rows, in_features).to(dtype).requires_grad_(), trained


def run(name, x, weight, trained):
    """Output and every gradient."""
    y = OPERATORS[name][0](x, weight, trained)
    return (y, *torch.autograd.grad(y.float().sin().sum(), (x, *trained)))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("kind", "amx", "dtype", "weight_dtype", "shape"),
    [
        ("nf4", False, "float32", "float32", (96, 224)),
        ("fp4", True, "bfloat16", "bfloat16", (128, 128)),
        ("int8", False, "bfloat16", "bfloat16", (96, 224)),
        ("nf4", True, "float32", "bfloat16", (128, 128)),
    ],
)
def test_operators_do_as_on_the_dequantized_matrix(monkeypatch, name, kind, amx, dtype, weight_dtype, shape):
    monkeypatch.setattr(products, "_has_amx", lambda: amx)
    dtype = getattr(torch, dtype)
    stored = QuantizedWeight(normal(*shape, dtype=getattr(torch, weight_dtype)) / 16, kind)
    x, trained = operands(name, *shape, 70, dtype)
    for a, b in zip(run(name, x, stored, trained), run(name, x, stored[:], trained), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 4e-3)
    with torch.no_grad():  # a generated token
        one = x[:1]
        a, b = (OPERATORS[name][0](one, weight, trained) for weight in (stored, stored[:]))
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("form", [bone_row, bone_left, bone_col])
def test_stochastic_rounding_on_a_quantized_matrix(monkeypatch, form):
    monkeypatch.setattr(products, "_has_amx", lambda: True)
    stored = QuantizedWeight(normal(128, 128, dtype=torch.bfloat16) / 16, "nf4")
    x, trained = normal(70, 128, dtype=torch.bfloat16), normal(8, 16, 16) / 100
    results = []
    for weight in (stored, stored[:]):
        torch.manual_seed(3)
        results.append(form(x, weight, trained, True))
    assert torch.equal(*results)


class Largest(TorchDispatchMode):
    """Records the largest number of elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("name", ["linear", "lora", "row", "left", "col"])
@pytest.mark.parametrize(("kind", "rows", "dtype"), [("nf4", 64, torch.bfloat16), ("int8", 1, torch.float32)])
def test_the_whole_matrix_is_never_dequantized_nor_kept(name, kind, rows, dtype):
    """8.4 M elements: operators build 2 M of them at a time, col 4 M, and none are kept for backward."""
    shape = (2048, 4096)
    stored = QuantizedWeight(torch.empty(shape, dtype=dtype).normal_(), kind)
    x, trained = operands(name, *shape, rows, dtype)
    saved = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run(name, x, stored, trained)
    assert largest.elements <= shape[0] * shape[1] / 2
    assert all(tensor.numel() < shape[0] * shape[1] / 4 for tensor in saved)
    if rows == 1:
        with Largest() as largest, torch.no_grad():
            OPERATORS[name][0](x, stored, trained)
        assert largest.elements <= shape[0] * shape[1] / 2


@pytest.mark.parametrize("name", ["linear", "lora", "row", "left", "col", "materialized col"])
def test_checkpointing_gives_the_same_gradients(name):
    stored = QuantizedWeight(normal(96, 224), "nf4")
    x, trained = operands(name, 96, 224, 9, torch.float32)
    plain = run(name, x, stored, trained)
    y = checkpoint(lambda x: OPERATORS[name][0](x, stored, trained), x, use_reentrant=False)
    again = (y, *torch.autograd.grad(y.sin().sum(), (x, *trained)))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_trained_weight_still_gets_its_gradient(monkeypatch):
    """`linear` keeps a frozen matrix by reference; a trainable one is saved, and a change of it is noticed."""
    monkeypatch.setattr(products, "_has_amx", lambda: False)  # products in bf16 save a copy instead
    x, weight = normal(70, 64, dtype=torch.bfloat16), normal(96, 64).requires_grad_()
    y = linear(x, weight)
    (gradient,) = torch.autograd.grad(y.float().sum(), weight, retain_graph=True)
    assert relative_error(gradient, x.float().sum(0).expand(96, 64)) < 1e-2
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()
    y = linear(x.float(), weight.bfloat16())
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert relative_error(gradient, x.float().sum(0).expand(96, 64)) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [lambda base: BoneLinear(base, BoneConfig(r=16, mode="col")), lambda base: LoraLinear(base, LoraConfig(r=4))],
)
def test_layers_quantize_their_weight(kind, make):
    layer = make(nn.Linear(128, 96))
    for name in layer.adapter_names:
        nn.init.normal_(getattr(layer, name), std=0.1)
    quantized(layer, kind)
    x = normal(5, 128)
    effective, held = layer.effective_weight(), layer.weight[:]
    assert relative_error(layer(x), x @ effective.T + layer.bias) < 1e-5
    assert relative_error(effective - held, layer.delta_weight(held)) < 1e-5
    assert {name for name, _ in layer.named_parameters()} == {"bias", *layer.adapter_names}


@pytest.mark.parametrize(("kind", "mode"), [("nf4", "row"), ("int8", "left")])
def test_compiles_whole(kind, mode):
    """torch.compile takes a layer on a quantized weight without a break in the graph, and agrees."""
    layer = BoneLinear(nn.Linear(64, 96, bias=False), BoneConfig(r=16, mode=mode))
    quantized(layer, kind)
    nn.init.normal_(layer.bone, std=0.1)
    x = torch.randn(70, 64, requires_grad=True)
    torch.compiler.reset()  # the cases differ in one class' attributes: more of them than it recompiles for
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x).sin().sum(), (x, layer.bone)) for f in (compiled, layer)), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_plain_layer(kind):
    layer = plain(128, 96, kind)
    x = normal(3, 5, 128)
    assert layer.adapter_names == ()
    assert relative_error(layer(x), nn.functional.linear(x, layer.weight[:], layer.bias)) < 1e-6
    assert torch.equal(layer.effective_weight(), layer.weight[:])
    assert kind in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, tmp_path):
    first, second = (plain(160, 96, kind) for _ in range(2))
    assert not torch.equal(first.weight[:], second.weight[:])
    torch.save(first.state_dict(), tmp_path / "layer.pth")
    second.load_state_dict(torch.load(tmp_path / "layer.pth", weights_only=True))
    assert torch.equal(first.weight[:], second.weight[:])
    assert torch.equal(copy.deepcopy(first).weight[:], first.weight[:])


@pytest.mark.slow
def test_pickled_weights_work_in_a_new_process(tmp_path):
    """As strategies that spawn processes do it; nothing has imported bitsandbytes there."""
    weights = [QuantizedWeight(normal(8, 64), kind) for kind in KINDS]
    torch.save([(weight, weight[:]) for weight in weights], tmp_path / "weight.pt")
    check = (
        "import sys, torch; assert all(torch.equal(w[:], q) for w, q in torch.load(sys.argv[1], weights_only=False))"
    )
    subprocess.run(
        [sys.executable, "-c", check, tmp_path / "weight.pt"],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize(
    ("kind", "cast"),
    [
        ("nf4", nn.Module.bfloat16),
        ("fp4", nn.Module.half),
        ("int8", lambda model: model.to("cpu", torch.bfloat16)),
    ],
)
def test_casting_the_model_does_not_round_the_scales(kind, cast):
    layer = plain(128, 96, kind)
    before = layer.weight[:]
    cast(layer)
    assert layer.bias.dtype != torch.float32
    assert torch.equal(layer.weight[:], before)
    assert layer.to("meta").weight.device.type == "meta"


def test_missing_bitsandbytes_names_the_command(monkeypatch):
    quant._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"--quant nf4: needs the package bitsandbytes.*Try: pip install bitsandbytes=="
    ):
        QuantizedWeight(torch.zeros(4, 64), "nf4")


def test_unknown_kind():
    with pytest.raises(ConfigError, match=r"--quant: invalid value; found int4, expected nf4 \| fp4 \| int8"):
        QuantizedWeight(torch.zeros(4, 64), "int4")
