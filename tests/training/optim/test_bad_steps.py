"""Steps with a bad loss or gradient are skipped without changing anything, and are reported."""

from __future__ import annotations

import contextlib
import itertools
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
from rwkv_peft.training.optim.bad_steps import StepGuard, spread_nonfinite
from tests.helpers import relative_error
from tests.training.optim.faults import INF_GRADIENT, INF_LOSS, NAN_LOSS, SPIKE, faults
from tests.training.small_runs import steps as steps_of
from tests.training.small_runs import train, write_inputs

ROOT = Path(__file__).resolve().parents[3]
STRATEGIES = ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
# The epsilon hides rounding errors, see test_methods_on_strategies.py. Every step is clipped.
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
    """A context in which these optimizer steps are not made, for reference."""
    plain = torch.optim.AdamW.step
    count = itertools.count()

    def step(optimizer, *args, **kwargs):
        if next(count) not in steps:
            plain(optimizer, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", step):
        yield


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_adapter(folder / "rwkv-0.safetensors")[0]


def test_a_skipped_step_changes_nothing(folder, capsys):
    """Bit for bit: parameters, moments and step counts are those of a run without these updates."""
    more = ["--epoch_steps", str(STEPS * 2), *TWO, *CLIPPED]
    plan = {2 * step + 1: fault for step, fault in PLAN.items()}  # in the second micro-batch
    with faults(plan):
        bad = train(folder / "bad", inputs_of(folder), *more)
    messages = capsys.readouterr().err
    with without_updates(set(PLAN)):
        never = train(folder / "without", inputs_of(folder), *more)
    assert [row["step"] for row in bad] == list(range(1, STEPS + 1)), "a skipped step counts"
    assert {row["step"] - 1 for row in bad if "skipped" in row} == set(PLAN)
    for step, (a, b) in enumerate(zip(bad, never, strict=True)):
        assert a["lr"] == b["lr"]
        if step not in PLAN:
            assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"]), step
            continue
        first = 8 * step
        assert a["samples"] == [[0, index] for index in range(first, first + 8)]
        assert f"step {step + 1} skipped: {a['skipped']}; samples (epoch:index) 0:{first}, 0:{first + 1}" in messages
    assert (bad[2]["loss"], bad[2]["grad_norm"]) == (None, None), "JSON has no NaN"
    assert bad[5]["loss"] is not None
    assert "above --grad_spike 10 x the median" in bad[14]["skipped"]
    ours, reference = adapter(folder / "bad"), adapter(folder / "without")
    assert all(torch.equal(ours[name], tensor) for name, tensor in reference.items())


@pytest.fixture(scope="module")
def pairs(folder):
    """All strategies in one pair of processes. Faults are on the second only, in a step's first micro-batch."""
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
    """A run in one process without the updates of the plan."""
    with without_updates(set(PLAN)):
        train(folder / "never", inputs_of(folder), "--epoch_steps", str(2 * STEPS), *TWO, *CLIPPED)
    return folder / "never"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fault_on_one_process_skips_the_step_on_all(strategy, pairs, never):
    """Otherwise a pair trains as one process does. Clipping by the global norm is active in every step."""
    rows, expected = steps_of(pairs / strategy), steps_of(never)
    assert {row["step"] - 1 for row in rows if "skipped" in row} == set(PLAN)
    for step, (a, b) in enumerate(zip(rows, expected, strict=True)):
        if step in PLAN:
            assert a["samples"] == [[0, index] for index in range(8 * step, 8 * step + 8)]
        else:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), step
            # Measured after the step with a spike: rounding changes the norm by up to 2e-4, under ddp by 4e-5.
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), step
            assert a["grad_norm"] > 10 * 0.05
    ours, reference = adapter(pairs / strategy), adapter(never)
    for name, tensor in reference.items():
        assert relative_error(ours[name], tensor) < 1e-4, name


@pytest.mark.slow
def test_zero_skips_steps_of_bf16_parameters(pairs):
    """DeepSpeed alone does not check the norm of these."""
    rows = steps_of(pairs / "stored_in_bf16")
    assert ["skipped" in row for row in rows] == [False, False, True, False, True, False]
    assert rows[3]["loss"] < rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_two_processes_agree_on_overflow(pairs):
    """If the loss is not finite on one process, the step is no overflow on either."""
    rows = steps_of(pairs / "half")
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
    """The error has a diagnosis; files saved before are unchanged."""
    flags = ["--epoch_steps", "3", "--epoch_count", "3", "--max_bad_steps", "3"]
    plan = dict.fromkeys([0, 1, 3, 5, 6, 7], fault)  # two, one, three in a row
    out = folder / f"stopped_{fault}"
    with faults(plan), pytest.raises(UserError, match=rf"training step 8: 3 steps in a row were skipped.*{diagnosis}"):
        train(out, inputs_of(folder), *flags)
    assert sorted(path.name for path in out.glob("rwkv-*")) == ["rwkv-0.safetensors", "rwkv-1.safetensors"]
    assert len(steps_of(out)) == 8, "the last bad step is in metrics.jsonl, too"


def guard(**settings) -> StepGuard:
    return StepGuard(OptimConfig(**settings))


def test_steps_without_tokens_in_the_loss_do_not_lower_the_median():
    judge = guard(grad_spike=10.0)
    assert all(judge.allows(norm) for norm in [0.0] * 30 + [1.0] * 12)
    assert not judge.allows(11.0)


def test_spikes_are_relative_to_the_median_of_good_norms():
    judge = guard(grad_spike=3.0)
    assert all(judge.allows(norm) for norm in [1.0, 50.0] * 5), "fewer than ten norms before; median 25.5"
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


def test_state_of_the_guard_round_trip():
    judge, later = guard(grad_spike=3.0), guard(grad_spike=3.0)
    assert all(judge.allows(1.0) for _ in range(10))
    judge.allows(math.nan)
    later.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert (later.bad_steps, later.in_a_row) == (1, 1)
    assert not later.allows(4.0)


@pytest.mark.parametrize(("value", "finite"), [(2.0, True), (math.inf, False), (math.nan, False)])
def test_a_loss_that_is_not_finite_has_nan_gradients(value, finite):
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = spread_nonfinite((x * x).sum() + torch.tensor(value))
    loss.backward()
    expected = torch.tensor([6.0, 8.0]) if finite else torch.full((2,), math.nan)
    assert torch.equal(x.grad.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def with_gradients(*gradients: list[float]) -> list[tuple[str, torch.nn.Parameter]]:
    """Return parameters, named a, b, ..., that have these gradients."""
    named = []
    for name, gradient in zip("abc", gradients, strict=False):
        parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        named.append((name, parameter))
    return named


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_clipping_is_torchs(max_norm):
    named, judge = with_gradients([3.0], [4.0, 12.0]), guard()
    assert judge.clip_or_drop(named, max_norm)
    assert (judge.norm, judge.skipped) == (13, None)
    factor = 1 / 13 if max_norm else 1
    for (_, parameter), gradient in zip(named, ([3.0], [4.0, 12.0]), strict=True):
        assert torch.allclose(parameter.grad, factor * torch.tensor(gradient), rtol=1e-6)


@pytest.mark.parametrize("overflowed", [False, True])
def test_gradients_of_a_skipped_step_are_dropped(overflowed):
    named, judge = with_gradients([3.0], [4.0, math.inf]), guard()
    assert not judge.clip_or_drop(named, 1.0, lambda: overflowed)
    assert judge.nonfinite_name == "b"
    assert (judge.overflows, judge.bad_steps) == ((1, 0) if overflowed else (0, 1))
    assert all(parameter.grad is None for _, parameter in named)
