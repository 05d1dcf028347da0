"""The pure parts of training: learning rate, parameter groups, loss."""

from __future__ import annotations

import pytest

from rwkv_peft.config import OptimConfig
from rwkv_peft.peft.injection import mark_trainable
from rwkv_peft.training.callbacks import Progress, StepMetrics
from rwkv_peft.training.optim import build_optimizer, parameter_groups
from rwkv_peft.training.schedule import learning_rate
from tests.helpers import lively_model


def test_constant_where_both_ends_are_equal():
    optim = OptimConfig(lr_init=2e-5, lr_final=2e-5)
    assert {learning_rate(step, 100, optim) for step in range(100)} == {2e-5}


def test_exponential_with_warmup():
    optim = OptimConfig(lr_init=1e-3, lr_final=1e-5, warmup_steps=10)
    rates = [learning_rate(step, 111, optim) for step in range(111)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[5] == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(1e-4), "half-way is the geometric mean"
    assert rates[110] == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_linear_to_zero_and_one_step_runs():
    optim = OptimConfig(lr_init=1e-3, lr_final=0.0)
    assert learning_rate(5, 11, optim) == pytest.approx(5e-4)
    assert learning_rate(10, 11, optim) == 0
    assert learning_rate(0, 1, optim) == 1e-3


def test_parameter_groups():
    model = lively_model()
    mark_trainable(model, "none")
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_id = {id(p): group for group in groups for p in group["params"]}
    att = model.blocks[0].att
    assert by_id[id(att.time_decay)]["lr_scale"] == 2.0
    assert by_id[id(att.time_decay)]["weight_decay"] == 0.0, "a vector in a (1, 1, C) coat does not decay"
    assert by_id[id(att.key.weight)] == by_id[id(model.head.weight)]
    assert by_id[id(att.key.weight)]["weight_decay"] == 0.1
    assert by_id[id(att.ln_x.weight)]["weight_decay"] == 0.0
    one_rate = parameter_groups(model, OptimConfig(layerwise_lr=0))
    assert {group["lr_scale"] for group in one_rate} == {1.0}


def test_frozen_parameters_have_no_optimizer_state():
    model = lively_model()
    trained = mark_trainable(model, "none", ["ln"])
    optimizer = build_optimizer(model, OptimConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


@pytest.mark.parametrize("width", [None, 200, 80])
def test_the_progress_line_keeps_what_matters_in_a_narrow_terminal(width):
    progress = Progress(total_steps=100)
    progress.average = 2.2
    step = StepMetrics(step=37, loss=2.113, lr=2e-5, tokens=2048, tokens_per_s=812.4, grad_norm=0.41, time=148.0)
    line = progress.line(step, width)
    assert all(word in line for word in ("37%", "step 37/100", "loss 2.113", "lr 2.0e-05", "812 tok/s", "left 0:04:12"))
    assert ("gnorm 0.41" in line) == (width != 80)
    assert width is None or len(line) < width
