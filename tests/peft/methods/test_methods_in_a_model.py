"""What every method must hold on an RWKV-6: what trains, files, merges, recomputation, learning rates."""

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
from rwkv_peft.peft.injection import inject, peft_layers
from rwkv_peft.peft.registry import METHODS, method_config
from rwkv_peft.training.optim.optimizer import build_optimizer
from tests.helpers import TINY, lively_model, relative_error
from tests.peft.cases import CASES, MODEL_CASES
from tests.peft.definitions import (
    MERGEABLE,
    MERGEABLE_NAMES,
    NAMES,
    gradients_of,
    loss_and_gradients,
    name_of,
    tokens,
    train_a_little,
)

PROMPT = MODEL_CASES[0]
every_case = pytest.mark.parametrize(("method", "options"), CASES, ids=NAMES)
every_adapter = pytest.mark.parametrize(("method", "options"), [*CASES, PROMPT], ids=[*NAMES, "prompt"])


def config_of(method: str, options: dict, **more) -> PeftConfig:
    """As config/flags.py resolves it, with every option written out."""
    return PeftConfig(peft=method, peft_config=asdict(method_config(method, options)), **more)


def base_model(**options) -> RWKV6:
    state = lively_model().state_dict()
    return model_from_state(TINY, state, "lively", **options)


def adapted_model(peft: PeftConfig, **options) -> RWKV6:
    """With adapters that are not what they began as."""
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
    model, before = base_model(), base_model()
    targets = add_adapter(model, config_of(method, options), gradients=gradients_of(model))
    layer = METHODS[method].layer
    trained = {f"{t}.{name}" for t in targets for name in layer.adapter_names} if layer else {"prompt"}
    kept = {f"{t}.{name}" for t in targets for name in layer.initial_names} if layer else set()
    assert set(model.state_dict()) == set(before.state_dict()) | trained | kept
    assert set(adapter_tensors(model)) == trained | kept
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    hidden, _ = model.hidden(tokens())
    model.loss(hidden, tokens(), torch.ones_like(tokens(), dtype=torch.bool)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    derived = {f"{t}.weight" for t in targets} if kept else set()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) == (name not in derived), name


@every_adapter
def test_parts_of_the_base_train_beside_it(method, options):
    model = base_model()
    targets = add_adapter(
        model, config_of(method, options, train_parts=("time", "ln_out")), gradients=gradients_of(model)
    )
    parts = {name for name, _ in base_model().named_parameters() if ".time_" in name or name.startswith("ln_out.")}
    layer = METHODS[method].layer
    trained = {f"{t}.{name}" for t in targets for name in layer.adapter_names} if layer else {"prompt"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained | parts
    assert set(loss_and_gradients(model, tokens())[1]) == trained | parts


@pytest.mark.parametrize(("method", "options"), MODEL_CASES[1:], ids=["lisa", "none"])
def test_methods_without_adapters_train_the_base(method, options):
    model = base_model()
    assert add_adapter(model, config_of(method, options)) == []
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(base_model().state_dict())


def save(folder, model: RWKV6, peft: PeftConfig, targets) -> tuple[str, str]:
    """A base and an adapter file."""
    state = base_model().state_dict()
    save_base(state, folder / "base.pth")
    info = AdapterInfo(
        method=peft.peft, options=peft.peft_config, targets=list(targets), fingerprint=fingerprint(state)
    )
    save_adapter(folder / "a.safetensors", adapter_tensors(model), info)
    assert read_adapter(folder / "a.safetensors")[1] == info
    return str(folder / "base.pth"), str(folder / "a.safetensors")


@every_adapter
@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
def test_the_adapter_file_gives_the_model_again(method, options, adapter_dtype, tmp_path):
    """Bit for bit: everything read from the file, and as a warm start."""
    peft = config_of(method, options, adapter_dtype=adapter_dtype, train_parts=("ln_out",))
    model = adapted_model(peft)
    assert relative_error(logits(model), logits(base_model())) > 1e-2
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    assert torch.equal(logits(load_with_adapter(base, adapter).model), logits(model))
    options = {**peft.peft_config, "load": adapter}
    again = config_of(method, options, adapter_dtype=adapter_dtype, train_parts=("ln_out",))
    second = base_model()
    add_adapter(second, again, start=warm_start(again, fingerprint(base_model().state_dict()), base))
    assert torch.equal(logits(second.eval()), logits(model))


@every_adapter
def test_a_bf16_base_gives_the_model_again(method, options, tmp_path):
    peft = config_of(method, options)
    model = adapted_model(peft, dtype=torch.bfloat16)
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    loaded = load_with_adapter(base, adapter, dtype=torch.bfloat16).model
    assert torch.equal(logits(loaded), logits(model))


@every_adapter
def test_the_pth_of_rwkv_peft_gives_the_model_again(method, options, tmp_path):
    peft = config_of(method, options)
    model = adapted_model(peft)
    save_pth_adapter(tmp_path / "a.pth", adapter_tensors(model))
    tensors = read_pth_adapter(tmp_path / "a.pth")
    assert set(tensors) == set(adapter_tensors(model))
    second = base_model()
    add_adapter(second, peft, start=Start("a.pth", tensors, None))
    assert torch.equal(logits(second.eval()), logits(model))


def test_miss_is_disha_in_the_pth(tmp_path):
    save_pth_adapter(tmp_path / "a.pth", adapter_tensors(adapted_model(config_of("miss", {"r": 16}))))
    assert {name.rpartition(".")[2] for name in load_base(tmp_path / "a.pth")} == {"disha"}


@pytest.mark.parametrize(("method", "options"), MERGEABLE, ids=MERGEABLE_NAMES)
@pytest.mark.parametrize("targets", [(), ("head", "att.key")])
def test_the_merged_file_equals_the_unmerged_model(method, options, targets, tmp_path):
    if options.get("g") == 8 and targets:
        options = options | {"g": 10}  # the head has 20 blocks
        targets = ("head",)
    peft = config_of(method, options, peft_targets=targets, train_parts=("ln_out",))
    model = adapted_model(peft)
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    before = load_base(base)
    report = merge(base, adapter, tmp_path / "merged.pth")
    assert (report.method, report.layers, report.replaced) == (method, len(peft_layers(model)), 2)
    assert relative_error(logits(load_plain(tmp_path / "merged.pth")), logits(model)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_base(base).items())


@pytest.mark.parametrize(("method", "options"), [CASES[-1], PROMPT], ids=["adapter", "prompt"])
def test_what_is_no_matrix_cannot_be_merged(method, options, tmp_path):
    peft = config_of(method, options)
    model = adapted_model(peft)
    base, adapter = save(tmp_path, model, peft, peft_layers(model))
    with pytest.raises(CheckpointError, match=rf"a.safetensors: .*{method}.* cannot be merged.*--adapter"):
        merge(base, adapter, tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


@pytest.mark.parametrize(
    ("method", "options"), [*CASES, *MODEL_CASES], ids=[*NAMES, *(name_of(case) for case in MODEL_CASES)]
)
def test_recomputing_blocks_changes_nothing(method, options):
    results = []
    for grad_cp in (False, True):
        model = adapted_model(config_of(method, options), grad_cp=grad_cp).train()
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
    peft = config_of(method, {"r": 4, "lr_ratio": 16})
    add_adapter(model, peft, gradients=gradients_of(model))
    train_a_little(model)
    optimizer = build_optimizer(model, OptimConfig(lr_init=1e-3))
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert by_id.keys() == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        assert by_id[id(parameter)]["lr_scale"] == (16 if name.endswith(".lora_B") else 1), name


@every_adapter
def test_on_meta_it_has_names_and_shapes_only(method, options):
    """A dry run: nothing is initialised, so nothing is asked for."""
    shapes = []
    for model in (model_on_meta(TINY), base_model()):
        gradients = gradients_of(model) if method == "lora_ga" and not model.emb.weight.is_meta else None
        add_adapter(model, config_of(method, options), gradients=gradients)
        shapes.append({name: (p.shape, p.requires_grad) for name, p in model.named_parameters()})
    assert shapes[0] == shapes[1]


def test_one_rate_unless_asked():
    model = base_model()
    add_adapter(model, config_of("lora", {"r": 4}))
    assert {group["lr_scale"] for group in build_optimizer(model, OptimConfig()).param_groups} == {1.0}


@every_case
def test_foreign_modules_of_any_dtype(method, options):
    """Linear layers with a bias inside someone else's model; the tied head of an embedding is left alone."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(96, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 96)).to(
            dtype
        )
        model[2].weight = model[0].weight
        before, ids = model(torch.arange(9)), torch.arange(9)
        peft = PeftConfig(peft=method, peft_config=options, peft_targets=("1", "2"))
        assert inject(model, peft, gradients=gradients_of(model)) == ["1", "2"]
        after = model.eval()(ids)
        assert after.dtype == dtype
        assert relative_error(after, before) < (1e-5 if dtype == torch.float32 else 2e-2)
        train_a_little(model)
        assert relative_error(model(ids), before) > 1e-2
