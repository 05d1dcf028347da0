"""The learning rate: a pure function of the step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.training.optim.schedule import DECAY_SHARE, SCHEDULES, learning_rate
from tests.training.small_runs import config_of

RATES = st.floats(1e-7, 1e-2)
SMALL = "--n_layer 1 --n_embd 64 --dry_run".split()
SHAPES = st.sampled_from(sorted(SCHEDULES))


def test_constant_where_both_ends_are_equal():
    optim = OptimConfig(lr_init=2e-5, lr_final=2e-5)
    assert {learning_rate(step, 100, optim) for step in range(100)} == {2e-5}


def test_exponential_with_warmup():
    optim = OptimConfig(lr_init=1e-3, lr_final=1e-5, warmup_steps=10)
    rates = [learning_rate(step, 111, optim) for step in range(111)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[5] == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(1e-4), "halfway is the geometric mean"
    assert rates[110] == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_linear_to_zero_and_one_step_runs():
    optim = OptimConfig(lr_init=1e-3, lr_final=0.0)
    assert learning_rate(5, 11, optim) == pytest.approx(5e-4)
    assert learning_rate(10, 11, optim) == 0
    assert learning_rate(0, 1, optim) == 1e-3


@given(SHAPES, RATES, RATES | st.just(0.0), st.integers(-1, 60), st.integers(1, 200))
def test_ends_warmup_and_range_of_every_schedule(schedule, begin, end, warmup, total):
    """Also for runs of one step, and runs shorter than their warmup."""
    optim = OptimConfig(lr_schedule=schedule, lr_init=begin, lr_final=end, warmup_steps=warmup)
    rates = [learning_rate(step, total, optim) for step in range(total)]
    warm = max(0, warmup)
    for step in range(min(warm, total)):
        assert rates[step] == pytest.approx(begin * (0.01 + 0.99 * step / warm))
    if total > warm:
        assert rates[warm] == pytest.approx(begin)
        last = begin if schedule == "constant" or total == warm + 1 else end
        assert rates[-1] == pytest.approx(last)
    low, high = sorted((begin, end))
    slack = 1e-9 * high
    assert all(low - slack <= rate <= high + slack for rate in rates[warm:]), "between the rates at its ends"
    ordered = sorted(rates[warm:], reverse=begin > end)
    assert rates[warm:] == pytest.approx(ordered, rel=1e-9), "monotonic"
    after = [learning_rate(step, total, optim) for step in (max(total, warm + 1), 10 * total + warm)]
    assert all(rate == pytest.approx(end if schedule != "constant" else begin) for rate in after if total > warm + 1)


@given(SHAPES, RATES, RATES | st.just(0.0), st.integers(0, 500))
def test_no_step_is_a_jump(schedule, begin, end, warmup):
    """The largest change between steps is that of the steepest schedules: wsd, or exp over six decades."""
    total = 2000 + warmup
    optim = OptimConfig(lr_schedule=schedule, lr_init=begin, lr_final=end, warmup_steps=warmup)
    rates = [learning_rate(step, total, optim) for step in range(warmup, total)]
    largest, high = max(abs(b - a) for a, b in itertools.pairwise(rates)), max(begin, end)
    assert largest <= high * math.log(1e6) / 1998


@pytest.mark.parametrize(
    ("schedule", "halfway", "late"),
    [
        ("exp", 1e-4, 1e-3 * 0.01**0.9),
        ("constant", 1e-3, 1e-3),
        ("linear", 5.05e-4, 1.09e-4),
        ("cosine", 5.05e-4, 1e-5 + 9.9e-4 * 0.5 * (1 + math.cos(0.9 * math.pi))),
        ("wsd", 1e-3, 5.05e-4),
    ],
)
def test_each_schedule_halfway_and_late(schedule, halfway, late):
    """From 1e-3 to 1e-5, at 50 % and 90 % of the steps after warmup; wsd is then halfway through its decay."""
    assert DECAY_SHARE == 0.2
    optim = OptimConfig(lr_schedule=schedule, lr_init=1e-3, lr_final=1e-5, warmup_steps=7)
    assert learning_rate(7 + 50, 7 + 101, optim) == pytest.approx(halfway)
    assert learning_rate(7 + 90, 7 + 101, optim) == pytest.approx(late)


def test_warmup_minus_1_is_no_warmup():
    """RWKV-LM's -1 is the same as 0."""
    for step in (0, 1, 50, 99):
        rates = {learning_rate(step, 100, OptimConfig(lr_final=1e-6, warmup_steps=warmup)) for warmup in (-1, 0)}
        assert len(rates) == 1


@pytest.mark.parametrize(("word", "schedule"), [("cos_decay", "cosine"), ("cosine", "cosine"), ("wsd", "wsd")])
def test_rwkv_pefts_names_of_schedules(word, schedule):
    assert config_of(["--lr_schedule", word, *SMALL]).optim.lr_schedule == schedule


def test_a_flag_without_effect_is_reported(capsys):
    config_of("--lr_schedule constant --lr_final 1e-6".split() + SMALL)
    assert "--lr_final has no effect with --lr_schedule constant" in capsys.readouterr().err
    config_of("--lr_schedule cosine --lr_final 1e-6".split() + SMALL)
    assert not capsys.readouterr().err
