"""Parameter groups and optimizers."""

from __future__ import annotations

import builtins

import pytest
import torch

from rwkv_peft.adapted_model import add_adapter, load_with_adapter
from rwkv_peft.base_model import load_base
from rwkv_peft.config.method import FullConfig
from rwkv_peft.config.sections import OptimConfig, RunConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.injection import mark_trainable
from rwkv_peft.training.optim.optimizer import build_optimizer, parameter_groups
from tests.helpers import lively_model, peft_section, relative_error
from tests.training.small_runs import train, write_inputs


def test_parameter_groups():
    model = lively_model()
    mark_trainable(model, FullConfig())
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_id = {id(p): group for group in groups for p in group["params"]}
    att = model.blocks[0].att
    assert by_id[id(att.time_decay)]["lr_scale"] == 2.0
    assert by_id[id(att.time_decay)]["weight_decay"] == 0.0, "a vector of shape (1, 1, C) does not decay"
    assert by_id[id(att.key.weight)] == by_id[id(model.head.weight)]
    assert by_id[id(att.key.weight)]["weight_decay"] == 0.1
    assert by_id[id(att.ln_x.weight)]["weight_decay"] == 0.0
    one_rate = parameter_groups(model, OptimConfig(layerwise_lr=0))
    assert {group["lr_scale"] for group in one_rate} == {1.0}


TIME_MATRICES = {"time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2", "time_faaaa"}


@pytest.mark.parametrize("layerwise", [0, 1])
def test_base_parameters_decay_by_rwkv_lms_rule(layerwise):
    """Only matrices decay; with --layerwise_lr no `time_*`, which RWKV-LM puts into groups without decay."""
    model = lively_model()
    mark_trainable(model, FullConfig())
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, layerwise_lr=layerwise))
    decaying = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) in decaying}
    assert names == ({"weight"} if layerwise else {"weight"} | TIME_MATRICES)


@pytest.mark.parametrize(
    ("method", "options", "ratios"),
    [("bone", {"r": 64}, {"bone": 1}), ("lora", {"r": 1, "lr_ratio": 16}, {"lora_A": 1, "lora_B": 16})],
)
def test_the_adapter_has_its_own_rate_and_decays(method, options, ratios):
    """(1, 64, 64) and (r, I) with r = 1 are matrices. LoRA+'s ratio multiplies --lr_bone."""
    model = lively_model()
    add_adapter(model, peft_section(method, options, peft_targets=("att",), train_parts=("time", "ln")))
    groups = parameter_groups(model, OptimConfig(lr_init=1e-5, lr_bone=3e-4, weight_decay=0.1))
    by_id = {id(p): group for group in groups for p in group["params"]}
    trained = [(name.rpartition(".")[2], by_id[id(p)]) for name, p in model.named_parameters() if p.requires_grad]
    assert set(ratios) <= {own for own, _ in trained}
    for own, group in trained:
        peak = 3e-4 * ratios[own] if own in ratios else 2e-5 if own == "time_decay" else 1e-5
        assert 1e-5 * group["lr_scale"] == pytest.approx(peak), own
        assert group["weight_decay"] == (0.1 if own in ratios else 0), own
    same = parameter_groups(model, OptimConfig(lr_init=1e-5))
    assert {group["lr_scale"] for group in same} == {1.0, 2.0, *map(float, ratios.values())}


def test_lr_bone_needs_an_adapter():
    with pytest.raises(ConfigError, match="--lr_bone: cannot be used with --peft none, which has no adapter"):
        RunConfig(optim=OptimConfig(lr_bone=1e-4))
    with pytest.raises(ConfigError, match="--lr_bone: needs a --lr_init above 0"):
        OptimConfig(lr_init=0.0, lr_bone=1e-4)


def test_the_first_step_moves_adapter_and_parts_by_their_rates(tmp_path):
    """In a run: Adam's first step has the size of the rate, for any gradient."""
    inputs = write_inputs(tmp_path)
    flags = "--epoch_steps 1 --lr_init 1e-5 --lr_final 1e-5 --lr_bone 3e-4 --train_parts ln --accelerator cpu".split()
    train(tmp_path / "run", inputs, "--peft", "bone", "--bone_config", '{"r":16}', *flags)
    model = load_with_adapter(inputs[1], tmp_path / "run" / "rwkv-0.safetensors").model
    assert float(model.blocks[0].att.key.bone.detach().abs().median()) == pytest.approx(3e-4, rel=1e-2)
    moved = model.blocks[0].ln1.weight.detach() - load_base(inputs[1])["blocks.0.ln1.weight"]
    assert float(moved.abs().median()) == pytest.approx(1e-5, rel=5e-2)


def adamw(parameter, gradients, *, lr, betas, eps, weight_decay):
    """Return the parameter after AdamW by its definition (arXiv 1711.05101, algorithm 2), in float64."""
    p, (b1, b2) = parameter.double().clone(), betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        p -= lr * weight_decay * p
        m, v = b1 * m + (1 - b1) * g.double(), b2 * v + (1 - b2) * g.double() ** 2
        p -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return p


class OneMatrix(torch.nn.Module):
    """A matrix with more than 4096 elements; bitsandbytes keeps fp32 state for smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(96, 64))


@pytest.mark.parametrize(("name", "bound"), [("adamw", 1e-4), ("adam_8bit", 2e-2)])
def test_optimizers_follow_the_definition(name, bound):
    """The change after 20 steps with weight decay; and a repetition gives the same bits."""
    gradients = [torch.randn(96, 64, generator=torch.Generator().manual_seed(n)) + 0.5 for n in range(20)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ends = []
    for _ in range(2):
        model = OneMatrix()
        start = model.weight.detach().clone()
        optimizer = build_optimizer(model, OptimConfig(optim=name, lr_init=1e-3, weight_decay=0.1))
        for gradient in gradients:
            model.weight.grad = gradient.clone()
            optimizer.step()
        ends.append(model.weight.detach().clone())
    expected = adamw(start, gradients, **settings)
    assert relative_error(ends[0] - start, expected - start) < bound
    assert torch.equal(ends[0], ends[1])
    state = optimizer.state[model.weight]
    if name == "adam_8bit":
        assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}
    else:
        assert optimizer.param_groups[0]["fused"]
        assert {"exp_avg", "exp_avg_sq", "step"} == set(state)


def test_8_bit_moments_train_like_fp32(tmp_path):
    inputs = write_inputs(tmp_path)
    flags = ["--peft", "bone", "--bone_config", '{"r":64}', "--accelerator", "cpu", "--epoch_steps", "12"]
    plain = train(tmp_path / "plain", inputs, *flags)
    eight = train(tmp_path / "eight", inputs, *flags, "--optim", "adam_8bit")
    assert eight[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-2)
    assert eight[-1]["loss"] != plain[-1]["loss"]


def test_8_bit_without_its_package(monkeypatch):
    there = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"--optim adam_8bit: needs the package bitsandbytes.*pip install"):
        build_optimizer(OneMatrix(), OptimConfig(optim="adam_8bit"))


def test_frozen_parameters_have_no_optimizer_state():
    model = lively_model()
    trained = mark_trainable(model, FullConfig(), ["ln"])
    optimizer = build_optimizer(model, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
