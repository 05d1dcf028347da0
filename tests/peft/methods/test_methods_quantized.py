"""Every method on a quantized base: memory, output, gradients, merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkv_peft.adapted_model import add_adapter, load_plain, load_with_adapter
from rwkv_peft.base_model import fingerprint, load_base
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.export.merge import merge
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.adapter_file import AdapterInfo, adapter_tensors, save_adapter
from rwkv_peft.peft.injection import adapter_parameters, inject, peft_layers
from rwkv_peft.peft.quantization import QuantizedWeight
from rwkv_peft.peft.registry import method_config
from tests.helpers import TINY, lively_model, peft_section, relative_error, write_base
from tests.peft.cases import CASES
from tests.peft.definitions import MERGEABLE, gradients_of

RUNS = [*CASES, ("prompt", {"tokens": 5})]
IDS = torch.randint(80, (2, 11), generator=torch.Generator().manual_seed(3))
TARGETS = IDS.roll(-1, 1)
MASK = torch.ones(2, 11, dtype=torch.bool)


def quantized_model(method: str, options: dict, kind: str, **model_options) -> RWKV6:
    """A trained-looking adapter on a quantized base."""
    torch.manual_seed(0)
    model = lively_model(TINY, **model_options)
    add_adapter(model, peft_section(method, options, quant=kind), gradients=gradients_of(model))
    with torch.no_grad():
        for name in sorted(adapter_parameters(model)):
            model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)), alpha=0.05)
    return model.eval()


def dequantized(model: RWKV6, method: str, options: dict) -> RWKV6:
    """The same model with plain weights: those that the quantized ones stand for, with the same adapter on them."""
    twin = lively_model(TINY)
    inject(twin, method_config(method, options), initialize=False)
    for name, layer in peft_layers(model).items():
        twin.get_submodule(name).weight.data = layer.weight[:]
    rest = {name: tensor for name, tensor in model.state_dict().items() if ".weight." not in name}
    twin.load_state_dict(rest, strict=False)
    return twin.eval()


@pytest.mark.parametrize(
    ("method", "options", "kind"), [*((*case, "nf4") for case in RUNS), (*RUNS[0], "fp4"), (*RUNS[1], "int8")]
)
def test_computes_and_trains_as_on_the_dequantized_base(method, options, kind):
    model = quantized_model(method, options, kind)
    twin = dequantized(model, method, options)
    trained = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    losses = []
    for each in (model, twin):
        hidden, _ = each.hidden(IDS)
        loss = each.loss(hidden, TARGETS, MASK)
        loss.backward()
        losses.append(loss.detach())
    assert relative_error(*losses) < 1e-6
    for name in trained:
        assert relative_error(model.get_parameter(name).grad, twin.get_parameter(name).grad) < 1e-4, name


@pytest.mark.parametrize(("method", "options"), RUNS)
def test_no_matrix_of_the_blocks_is_stored_in_full_precision(method, options):
    """A wider model, in which small tensors do not count: 4 bits and scales for each element, and no full copy."""
    config = TINY.__class__(n_layer=1, n_embd=256, vocab_size=16, head_size=32, dim_ffn=512).resolved()
    model = lively_model(config)
    add_adapter(model, peft_section(method, options, quant="nf4"), gradients=gradients_of(model))
    elements = 6 * 256 * 256 + 2 * 256 * 512
    stored = sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedWeight))
    assert stored <= 0.57 * elements
    smallest = 256 * 256
    assert not [name for name, p in model.named_parameters() if p.numel() >= smallest]
    assert not [name for name, b in model.named_buffers() if b.numel() >= smallest and not name.endswith(".codes")]


@pytest.mark.parametrize(("method", "options"), [("bone", {"r": 16}), ("pissa", {"r": 4})])
def test_checkpointing_changes_nothing(method, options):
    results = []
    for grad_cp in (False, True):
        model = quantized_model(method, options, "nf4", grad_cp=grad_cp)
        hidden, _ = model.hidden(IDS)
        model.loss(hidden, TARGETS, MASK).backward()
        results.append({name: model.get_parameter(name).grad for name in adapter_parameters(model)})
    for name, gradient in results[0].items():
        assert relative_error(results[1][name], gradient) < 1e-5, name


def save_run(folder, method: str, options: dict, kind: str):
    """A base file, and the adapter file of a run on it as `kind`."""
    base = write_base(folder / "base.pth")
    model = quantized_model(method, options, kind)
    info = AdapterInfo(
        method=method, options=options, targets=_carrying(model), quant=kind, fingerprint=fingerprint(load_base(base))
    )
    save_adapter(folder / "a.safetensors", adapter_tensors(model), info)
    return base, folder / "a.safetensors", model


def _carrying(model: RWKV6) -> list[str]:
    return [name for name, layer in peft_layers(model).items() if layer.adapter_names]


@pytest.mark.parametrize(("method", "options"), MERGEABLE)
def test_merges_onto_the_original_or_onto_the_quantized_base(method, options, tmp_path):
    base, adapter, model = save_run(tmp_path, method, options, "nf4")
    trained = model(IDS)[0]
    quantized = merge(base, adapter, tmp_path / "quantized.pth", onto="quantized")
    original = merge(base, adapter, tmp_path / "original.pth")
    assert relative_error(load_plain(tmp_path / "quantized.pth")(IDS)[0], trained) < 1e-5
    full = load_with_adapter(base, adapter).model(IDS)[0]
    assert relative_error(load_plain(tmp_path / "original.pth")(IDS)[0], full) < 1e-5
    assert relative_error(full, trained) > 1e-3, "quantization must do something for this test to mean anything"
    assert quantized.probe < 1e-5 < 1e-3 < original.probe
    assert f"differ by {100 * original.probe:.2f} % from" in str(original)


def test_pissa_quantizes_its_residual(tmp_path):
    """QPiSSA: what is left after the principal part is smaller, and so is its error."""
    torch.manual_seed(0)
    model, full = lively_model(), lively_model()
    name = "blocks.0.ffn.key"
    with torch.no_grad():  # a weight with a large principal part
        weight = 5 * torch.randn(128, 2) @ torch.randn(2, 64) + torch.randn(128, 64)
        for each in (model, full):
            each.get_submodule(name).weight.copy_(weight)
    add_adapter(model, peft_section("pissa", {"r": 4, "svd_niter": 0}, quant="nf4"))
    error = relative_error(model.get_submodule(name).effective_weight(), weight)
    assert error < 0.5 * relative_error(QuantizedWeight(weight, "nf4")[:], weight)


@pytest.mark.parametrize("method", ["none", "lisa"])
def test_a_base_that_trains_cannot_be_quantized(method):
    model = lively_model()
    with pytest.raises(
        ConfigError, match="--quant: nf4 cannot be used with --peft none, because a quantized base cannot be trained"
    ):
        add_adapter(model, peft_section(method, quant="nf4"))


def test_onto_quantized_needs_a_quantized_run(tmp_path):
    base, adapter, _ = save_run(tmp_path, "lora", {"r": 4}, "none")
    with pytest.raises(CheckpointError, match="was not trained on a quantized base"):
        merge(base, adapter, tmp_path / "out.pth", onto="quantized")


def test_embedding_and_plain_head_stay_as_they_are():
    model = quantized_model("lora", {"r": 4}, "nf4")
    assert isinstance(model.head.weight, nn.Parameter)
    assert isinstance(model.emb.weight, nn.Parameter)
    carrying = lively_model()
    peft = peft_section("lora", {"r": 4}, peft_targets=("head", "emb"), quant="int8")
    add_adapter(carrying, peft)
    assert isinstance(carrying.head.weight, QuantizedWeight)
    assert isinstance(carrying.emb.weight, nn.Parameter)
    assert carrying(IDS)[0].isfinite().all()
