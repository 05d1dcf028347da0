"""Steps whose loss or gradient is not finite, or whose gradient is far too large, change nothing and are told of."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.errors import UserError
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.optim.bad_steps import StepGuard, clip_or_skip, keep_honest
from tests.helpers import relative_error
from tests.training.optim.faults import INF_GRADIENT, INF_LOSS, NAN_LOSS, SPIKE, faults
from tests.training.small_runs import train, write_inputs

ROOT = Path(__file__).resolve().parents[3]
STRATEGIES = ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
# An epsilon above rounding: see test_methods_on_strategies.py. Clipping is at work in every step.
COMMON = '--peft bone --bone_config {"r":16} --accelerator cpu --precision fp32 --adam_eps 1e-4'.split()
CLIPPED = ["--dataload", "get", "--grad_clip", "0.05", "--grad_spike", "10"]
TWO = ["--accumulate_grad_batches", "2"]
PLAN = {2: NAN_LOSS, 3: INF_LOSS, 5: INF_GRADIENT, 14: SPIKE}
STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_inputs(folder)
    return folder


def inputs_of(folder: Path) -> list[str]:
    return ["--load_model", f"{folder}/base.pth", "--data_file", f"{folder}/data", *COMMON]


@contextlib.contextmanager
def without_updates(steps: set[int]):
    """The reference: these optimizer steps are never asked for."""
    plain = torch.optim.AdamW.step
    made = iter(range(10**6))

    def step(optimizer, closure):
        if next(made) in steps:
            return closure()
        return plain(optimizer, closure)

    with mock.patch.object(torch.optim.AdamW, "step", step):
        yield


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_adapter(folder / "rwkv-0.safetensors")[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_nothing(accumulate, folder, capsys):
    """To the last bit: parameters, moments and the steps they count are those of a run that never asked."""
    more = ["--epoch_steps", str(STEPS * accumulate), "--accumulate_grad_batches", str(accumulate), *CLIPPED]
    plan = {call * accumulate + accumulate - 1: fault for call, fault in PLAN.items()}
    with faults(plan):
        bad = train(folder / f"bad{accumulate}", inputs_of(folder), *more)
    messages = capsys.readouterr().err
    with without_updates(set(PLAN)):
        never = train(folder / f"never{accumulate}", inputs_of(folder), *more)
    assert [row["step"] for row in bad] == list(range(1, STEPS + 1)), "a skipped step counts"
    assert {row["step"] - 1 for row in bad if "skipped" in row} == set(PLAN)
    for step, (a, b) in enumerate(zip(bad, never, strict=True)):
        assert a["lr"] == b["lr"]
        if step not in PLAN:
            assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"]), step
            continue
        first = step * 4 * accumulate
        assert a["samples"] == [[0, index] for index in range(first, first + 4 * accumulate)]
        assert f"step {step + 1} skipped: {a['skipped']}; samples (epoch:index) 0:{first}, 0:{first + 1}" in messages
    assert (bad[2]["loss"], bad[2]["grad_norm"]) == (None, None), "JSON has no NaN"
    assert bad[5]["loss"] is not None
    assert "above --grad_spike 10 x the median" in bad[14]["skipped"]
    ours, reference = adapter(folder / f"bad{accumulate}"), adapter(folder / f"never{accumulate}")
    assert all(torch.equal(ours[name], tensor) for name, tensor in reference.items())


@pytest.fixture(scope="module")
def pairs(folder):
    """All strategies, in one pair of processes: a fault happens on the second only, in the first batch of a step."""
    runs = []
    for strategy in STRATEGIES:
        rates = f"--ctx_len 48 --lr_init 1e-3 --lr_final 1e-3 --epoch_steps {2 * STEPS}".split()
        more = f"--strategy {strategy} --devices 2 --micro_bsz 2 --accumulate_grad_batches 2".split()
        flags = [*inputs_of(folder), *rates, *more, *CLIPPED, "--proj_dir", f"{folder}/{strategy}"]
        runs.append((flags, {2 * step: fault for step, fault in PLAN.items()}))
    half = runs[0][0] + ["--precision", "fp16", "--proj_dir", f"{folder}/half"]
    runs.append((half, {4: NAN_LOSS, 10: INF_GRADIENT}))
    stored = [*runs[2][0], "--adapter_dtype", "bf16", "--epoch_steps", "12", "--proj_dir", f"{folder}/stored_in_bf16"]
    runs.append((stored, {4: NAN_LOSS, 8: INF_GRADIENT}))
    (folder / "runs.json").write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "tests/training/optim/faults.py", f"{folder}/runs.json"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'RWKV-PEFT'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def never(folder):
    """One process that never asks for the steps of the plan."""
    with without_updates(set(PLAN)):
        train(folder / "never", inputs_of(folder), "--epoch_steps", str(2 * STEPS), *TWO, *CLIPPED)
    return folder / "never"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fault_on_one_process_skips_the_step_on_all(strategy, pairs, never):
    """A pair then trains what one process does; clipping is by the global norm, far below it."""
    rows, expected = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (pairs / strategy, never)
    )
    assert {row["step"] - 1 for row in rows if "skipped" in row} == set(PLAN)
    for step, (a, b) in enumerate(zip(rows, expected, strict=True)):
        if step in PLAN:
            assert a["samples"] == [[0, index] for index in range(8 * step, 8 * step + 8)]
        else:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), step
            # After a spike's batch the norm has been seen to turn rounding into 2e-4, under ddp into 4e-5.
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), step
            assert a["grad_norm"] > 10 * 0.05
    ours, reference = adapter(pairs / strategy), adapter(never)
    for name, tensor in reference.items():
        assert relative_error(ours[name], tensor) < 1e-4, name


@pytest.mark.slow
def test_zero_skips_with_bf16_parameters_too(pairs):
    """By itself, DeepSpeed makes a step of any norm with those."""
    rows = [json.loads(line) for line in (pairs / "stored_in_bf16" / "metrics.jsonl").read_text().splitlines()]
    assert ["skipped" in row for row in rows] == [False, False, True, False, True, False]
    assert rows[3]["loss"] < rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_two_processes_agree_on_what_fp16s_scale_is_to_blame_for(pairs):
    """A loss that is not finite on one of them is no overflow on either."""
    rows = [json.loads(line) for line in (pairs / "half" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] - 1: row["skipped"][:8] for row in rows if "skipped" in row} == {2: "loss or ", 5: "overflow"}
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    ("fault", "diagnosis"),
    [
        (NAN_LOSS, r"loss nan, gradient norm nan, learning rate 0.001; .*Try --precision fp32"),
        (INF_GRADIENT, r"loss \d.*norm (inf|nan).*first gradient that is not finite: blocks.0.*lower --lr_init"),
    ],
)
def test_too_many_in_a_row_stop_the_run(fault, diagnosis, folder):
    """The diagnosis names what a user can look at; what was saved before stays."""
    flags = ["--epoch_steps", "3", "--epoch_count", "3", "--max_bad_steps", "3"]
    plan = dict.fromkeys([0, 1, 3, 5, 6, 7], fault)  # two, one, three in a row
    out = folder / f"stopped_{fault}"
    with faults(plan), pytest.raises(UserError, match=rf"training step 8: 3 steps in a row were skipped.*{diagnosis}"):
        train(out, inputs_of(folder), *flags)
    assert sorted(path.name for path in out.glob("rwkv-*")) == ["rwkv-0.safetensors", "rwkv-1.safetensors"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8, "the last bad step is on record too"


def guard(**settings) -> StepGuard:
    return StepGuard(OptimConfig(**settings))


def test_steps_that_train_nothing_do_not_lower_the_median():
    judge = guard(grad_spike=10.0)
    assert all(judge.allows(norm) for norm in [0.0] * 30 + [1.0] * 12)
    assert not judge.allows(11.0)


def test_spikes_are_told_by_the_median_of_good_norms():
    judge = guard(grad_spike=3.0)
    assert all(judge.allows(norm) for norm in [1.0, 50.0] * 5), "too few norms to tell: median 25.5"
    assert not judge.allows(77.0)
    assert judge.allows(76.0)
    judge = guard(grad_spike=3.0)
    assert all(judge.allows(1.0) for _ in range(10))
    assert not any(judge.allows(4.0) for _ in range(20)), "spikes must not move the median"
    assert (judge.bad_steps, judge.in_a_row) == (20, 20)
    assert judge.allows(2.9)
    assert judge.in_a_row == 0
    assert all(judge.allows(2.0) for _ in range(100)), "the last 100 norms are all 2 now"
    assert judge.allows(5.9)
    assert guard().allows(1e30)


def test_a_guard_goes_on_from_its_state():
    judge, later = guard(grad_spike=3.0), guard(grad_spike=3.0)
    assert all(judge.allows(1.0) for _ in range(10))
    judge.allows(math.nan)
    later.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert (later.bad_steps, later.in_a_row) == (1, 1)
    assert not later.allows(4.0)


@pytest.mark.parametrize(("value", "honest"), [(2.0, True), (math.inf, False), (math.nan, False)])
def test_the_gradient_tells_of_the_loss(value, honest):
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = keep_honest((x * x).sum() + torch.tensor(value))
    loss.backward()
    assert x.grad.isfinite().all() == honest
    assert not honest or torch.equal(x.grad, torch.tensor([6.0, 8.0]))


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_clipping_is_torchs(limit):
    names, grads = ["a", "b"], [torch.tensor([3.0]), torch.tensor([4.0, 12.0])]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    judge = guard()
    clip_or_skip(judge, list(zip(names, parameters, strict=True)), limit)
    assert judge.norm == 13
    factor = 1 / 13 if limit else 1
    for parameter, grad in zip(parameters, grads, strict=True):
        assert torch.allclose(parameter.grad, factor * grad, rtol=1e-6)
