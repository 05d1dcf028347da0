"""Checks of every method on an RWKV-6: trainable parameters, files, merges, recomputation, learning rates."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from rwkv_peft.adapted_model import Start, add_adapter, load_plain, load_with_adapter, warm_start
from rwkv_peft.base_model import fingerprint, load_base, save_base
from rwkv_peft.config.sections import OptimConfig, PeftConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.export.merge import merge
from rwkv_peft.model.init import model_from_state, model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.adapter_file import (
    AdapterInfo,
    adapter_tensors,
    read_adapter,
    read_pth_adapter,
    save_adapter,
    save_pth_adapter,
)
from rwkv_peft.peft.injection import peft_layers
from rwkv_peft.peft.registry import method_config, method_named
from rwkv_peft.training.optim.optimizer import build_optimizer
from tests.helpers import TINY, lively_model, peft_section, relative_error
from tests.peft.cases import CASES, MODEL_CASES
from tests.peft.definitions import (
    MERGEABLE,
    gradients_of,
    is_mergeable,
    loss_and_gradients,
    name_of,
    tokens,
    train_a_little,
)

PROMPT = MODEL_CASES[0]
ADAPTERS = [*CASES, PROMPT]
every_adapter = pytest.mark.parametrize(("method", "options"), ADAPTERS, ids=map(name_of, ADAPTERS))


def base_model(**options) -> RWKV6:
    state = lively_model().state_dict()
    return model_from_state(TINY, state, "lively", **options)


def adapted_model(peft: PeftConfig, **options) -> RWKV6:
    """Return a model whose adapters differ from their initial values."""
    model = base_model(**options)
    torch.manual_seed(2)
    add_adapter(model, peft, gradients=gradients_of(model))
    train_a_little(model, 0.05)
    return model.eval()


def logits(model: RWKV6) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens())[0]


@every_adapter
def test_exactly_the_promised_names_train(method, options):
    """The adapter, and the parts of the base that --train_parts names."""
    model, before = base_model(), base_model()
    peft = peft_section(method, options, train_parts=("time", "ln_out"))
    targets = add_adapter(model, peft, gradients=gradients_of(model))
    layer = method_named(method).layer
    adapter = {f"{t}.{name}" for t in targets for name in layer.adapter_names} if layer else {"prompt"}
    kept = {f"{t}.{name}" for t in targets for name in layer.initial_names} if layer else set()
    parts = {name for name in before.state_dict() if ".time_" in name or name.startswith("ln_out.")}
    trained = adapter | parts
    assert set(model.state_dict()) == set(before.state_dict()) | adapter | kept
    assert set(adapter_tensors(model)) == trained | kept
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    hidden, _ = model.hidden(tokens())
    model.loss(hidden, tokens(), torch.ones_like(tokens(), dtype=torch.bool)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    derived = {f"{t}.weight" for t in targets} if kept else set()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) == (name not in derived), name


@pytest.mark.parametrize(("method", "options"), MODEL_CASES[1:], ids=["lisa", "none"])
def test_methods_without_adapters_train_the_base(method, options):
    model = base_model()
    assert add_adapter(model, peft_section(method, options)) == []
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(base_model().state_dict())


def save(folder, model: RWKV6, peft: PeftConfig, targets) -> tuple[str, str]:
    """A base and an adapter file."""
    state = base_model().state_dict()
    save_base(state, folder / "base.pth")
    info = AdapterInfo(
        method=peft.method.name, options=asdict(peft.method), targets=list(targets), fingerprint=fingerprint(state)
    )
    save_adapter(folder / "a.safetensors", adapter_tensors(model), info)
    assert read_adapter(folder / "a.safetensors")[1] == info
    return str(folder / "base.pth"), str(folder / "a.safetensors")


@every_adapter
def test_every_file_gives_the_same_model_again(method, options, tmp_path):
    """Bit for bit: all read from the adapter file, as a warm start, and from RWKV-PEFT's .pth."""
    peft = peft_section(method, options, train_parts=("ln_out",))
    model = adapted_model(peft)
    assert relative_error(logits(model), logits(base_model())) > 1e-2
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    assert torch.equal(logits(load_with_adapter(base, adapter).model), logits(model))

    if "load" in asdict(peft.method):
        again = peft_section(method, options | {"load": adapter}, train_parts=("ln_out",))
        second = base_model()
        add_adapter(second, again, start=warm_start(again.method, fingerprint(base_model().state_dict()), base))
        assert torch.equal(logits(second.eval()), logits(model))

    save_pth_adapter(tmp_path / "a.pth", adapter_tensors(model))
    tensors = read_pth_adapter(tmp_path / "a.pth")
    assert set(tensors) == set(adapter_tensors(model))
    third = base_model()
    add_adapter(third, peft, start=Start("a.pth", tensors, None))
    assert torch.equal(logits(third.eval()), logits(model))


@pytest.mark.parametrize(("method", "options"), [CASES[0], ("pissa", {"r": 4}), PROMPT], ids=["row", "pissa", "prompt"])
def test_bf16_gives_the_same_model_again(method, options, tmp_path):
    """A bf16 base, and an adapter that trained in bf16."""
    peft = peft_section(method, options, adapter_dtype="bf16")
    model = adapted_model(peft, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    loaded = load_with_adapter(base, adapter, dtype=torch.bfloat16).model
    assert torch.equal(logits(loaded), logits(model))


def test_a_warm_start_needs_the_same_method_and_options(tmp_path):
    peft = peft_section("lora", {"r": 4, "alpha": 8})
    model = adapted_model(peft)
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    base_print = fingerprint(base_model().state_dict())
    for method, options, message in (
        (
            "lora",
            {"r": 4},
            r"a.safetensors: the adapter was trained with alpha=8.0, but this run uses alpha=32.0. Use the same value",
        ),
        ("lora", {"r": 8, "alpha": 8}, "the adapter was trained with r=4, but this run uses r=8"),
        ("dora", {"r": 4, "alpha": 8}, "the adapter was trained with method=lora, but this run uses method=dora"),
    ):
        with pytest.raises(CheckpointError, match=message):
            warm_start(method_config(method, options | {"load": adapter}), base_print, base)
    warm_start(method_config("lora", {"r": 4, "alpha": 8, "lr_ratio": 2, "load": adapter}), base_print, base)


def test_miss_is_disha_in_the_pth(tmp_path):
    save_pth_adapter(tmp_path / "a.pth", adapter_tensors(adapted_model(peft_section("miss", {"r": 16}))))
    assert {name.rpartition(".")[2] for name in load_base(tmp_path / "a.pth")} == {"disha"}


@pytest.mark.parametrize(
    ("method", "options", "targets"),
    [*((*case, ()) for case in MERGEABLE), *((*case, ("head", "att.key")) for case in (CASES[0], ("pissa", {"r": 4})))],
)
def test_the_merged_file_equals_the_unmerged_model(method, options, targets, tmp_path):
    peft = peft_section(method, options, peft_targets=targets, train_parts=("ln_out",))
    model = adapted_model(peft)
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    before = load_base(base)
    report = merge(base, adapter, tmp_path / "merged.pth")
    assert (report.method, report.layers, report.replaced) == (method, len(peft_layers(model)), 2)
    assert relative_error(logits(load_plain(tmp_path / "merged.pth")), logits(model)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_base(base).items())


@pytest.mark.parametrize(("method", "options"), [case for case in ADAPTERS if not is_mergeable(case)])
def test_methods_that_are_no_matrix_cannot_be_merged(method, options, tmp_path):
    peft = peft_section(method, options)
    model = adapted_model(peft)
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    with pytest.raises(CheckpointError, match=rf"a.safetensors: .*{method}.* cannot be merged.*--adapter"):
        merge(base, adapter, tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


@pytest.mark.parametrize(
    ("method", "options"), [*CASES, *MODEL_CASES], ids=[name_of(case) for case in [*CASES, *MODEL_CASES]]
)
def test_recomputing_blocks_changes_nothing(method, options):
    results = []
    for grad_cp in (False, True):
        model = adapted_model(peft_section(method, options), grad_cp=grad_cp).train()
        torch.manual_seed(7)  # of dropout
        results.append(loss_and_gradients(model, tokens()))
    (loss, gradients), (loss_cp, gradients_cp) = results
    assert float(loss_cp) == pytest.approx(float(loss), rel=1e-6)
    assert gradients.keys() == gradients_cp.keys()
    for name in gradients:
        assert gradients[name].norm() > 0, name
        assert relative_error(gradients_cp[name], gradients[name]) < 1e-6, name


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "olora", "lora_ga"])
def test_b_learns_at_its_own_rate(method):
    """LoRA+: the first step of Adam moves everything by its rate."""
    model = base_model()
    peft = peft_section(method, {"r": 4, "lr_ratio": 16})
    add_adapter(model, peft, gradients=gradients_of(model))
    train_a_little(model)
    optimizer = build_optimizer(model, OptimConfig(lr_init=1e-3))
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert by_id.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        assert by_id[id(parameter)]["lr_scale"] == (16 if name.endswith(".lora_B") else 1), name


def test_on_meta_a_model_has_names_and_shapes_only():
    """A dry run: nothing is initialized, so no gradients are needed."""
    for method, options in ADAPTERS:
        shapes = []
        for model in (model_on_meta(TINY), base_model()):
            gradients = None if model.emb.weight.is_meta else gradients_of(model)
            add_adapter(model, peft_section(method, options), gradients=gradients)
            shapes.append({name: (p.shape, p.requires_grad) for name, p in model.named_parameters()})
        assert shapes[0] == shapes[1], method


def test_one_rate_unless_asked():
    model = base_model()
    add_adapter(model, peft_section("lora", {"r": 4}))
    assert {group["lr_scale"] for group in build_optimizer(model, OptimConfig()).param_groups} == {1.0}
