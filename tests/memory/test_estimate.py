"""The memory estimate: what is counted on fake tensors, against sums by hand and real steps."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.sections import RunConfig
from rwkv_peft.memory import estimate, step_tensors
from rwkv_peft.memory.estimate import Expected, cheaper_settings, expect
from rwkv_peft.memory.step_tensors import Ledger, Step
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.ops.low_rank import lora_linear
from rwkv_peft.peft.quantization import QuantizedWeight
from rwkv_peft.training.metrics import startup_summary
from rwkv_peft.training.model_setup import open_base
from rwkv_peft.training.step import TrainingModule
from tests.helpers import TINY, lively_model, peft_section, with_shape, write_base
from tests.memory.live_bytes import LiveBytes
from tests.training.small_runs import COMMON, config_of, train, train_flags, write_inputs

SHAPE = "--n_layer 6 --n_embd 64 --head_size 32 --dim_att 64 --vocab_size 300 --ctx_len 40 --micro_bsz 3".split()
COL = ["--bone_config", '{"mode":"col","r":16}']


MORE_FLAGS = [
    "--peft bone --quant int8",
    "--peft none --grad_cp 1",
    "--peft prompt --dataload get --strategy deepspeed_stage_2",
    "--peft lora --peft_targets att head --dataload pack --train_parts time ln",
]


def resolve(*flags: str) -> RunConfig:
    return config_of([*SHAPE, "--dry_run", *flags])


@pytest.mark.parametrize(
    "flags",
    [
        "--peft bone --grad_cp 1 --precision bf16",
        "--peft none --ctx_len 2",  # gradients are larger than activations
        *(pytest.param(flags, marks=pytest.mark.slow) for flags in MORE_FLAGS),
    ],
)
def test_extrapolation_equals_counting_all_blocks(flags, monkeypatch):
    config = resolve(*flags.split(), *(["--bone_config", '{"r":16}'] if "bone" in flags else []))
    extrapolated = expect(config)
    monkeypatch.setattr(step_tensors, "COUNTED_BLOCKS", (6, 7))
    assert expect(config).step == pytest.approx(extrapolated.step, rel=1e-3)
    assert expect(config).weights == extrapolated.weights


def test_blocks_that_differ_are_counted_one_by_one():
    everywhere = expect(resolve("--peft", "lora"))
    last = expect(resolve("--peft", "lora", "--peft_targets", "blocks.5.att.*"))
    assert last.optimizer < everywhere.optimizer / 6
    assert last.step < 0.5 * everywhere.step  # nothing is kept for backward below the first trainable block


def test_counted_activations_are_those_that_autograd_keeps():
    """In a real forward pass: every storage but the parameters', once."""
    model = lively_model(TINY)
    add_adapter(model, peft_section("lora", {"r": 8}))
    ids = torch.zeros(2, 24, dtype=torch.int64)
    known, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = model.hidden(ids)
    ledger = Ledger()
    with torch._subclasses.fake_tensor.FakeTensorMode(), ledger:
        fake = model_on_meta(TINY)
        add_adapter(fake, peft_section("lora", {"r": 8}))
        step_tensors._materialize(fake, torch.device("cpu"))
        ids = torch.empty(2, 24, dtype=torch.int64)
        before = ledger.live - ids.nbytes
        hidden = fake.hidden(ids)[0]
        gc.collect()
        alive = hidden.untyped_storage().nbytes() + ids.nbytes  # not kept for backward
        assert ledger.live - before == pytest.approx(sum(kept.values()) + alive, rel=0.02)


def test_temporaries_count_until_they_are_freed():
    ledger = Ledger()
    with torch._subclasses.fake_tensor.FakeTensorMode(), ledger:
        a = torch.empty(1000)
        for _ in range(3):
            a.add_(a * 2)
    assert (ledger.live, ledger.most) == (4000, 8000)
    del a
    assert ledger.live == 0


def expect_with_base(tmp_path, dtype: torch.dtype, *flags: str) -> Expected:
    """Return the estimate of a run on a base file of this dtype."""
    path = write_base(tmp_path / "base.pth", with_shape(n_layer=3, vocab_size=300), dtype=dtype)
    config = config_of(["--load_model", str(path), "--dry_run", "--ctx_len", "8", *flags])
    base = open_base(config)
    return expect(config, base)


def test_weights_have_the_dtype_of_the_run(tmp_path):
    wide = expect_with_base(tmp_path, torch.float32, "--peft", "prompt")
    half = expect_with_base(tmp_path, torch.bfloat16, "--peft", "prompt", "--precision", "bf16")
    model = model_on_meta(with_shape(n_layer=3, vocab_size=300))
    large = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    vectors = sum(p.numel() for p in model.parameters()) - large
    # The file's bf16 vectors stay mapped in addition to the model's, which are fp32.
    assert wide.weights - half.weights == 2 * large - 2 * vectors
    assert wide.optimizer == half.optimizer == 2 * 20 * 64 * 4  # two moments of the prompt


def test_a_base_of_another_dtype_is_copied_while_it_loads(tmp_path):
    same = expect_with_base(tmp_path, torch.float32, "--peft", "prompt")
    other = expect_with_base(tmp_path, torch.bfloat16, "--peft", "prompt")
    assert other.loading == pytest.approx(1.5 * same.loading, rel=0.02)
    assert other.weights == same.weights


def test_strategies_that_copy_or_shard():
    def optimizer(*flags):
        return expect(resolve("--peft", "none", *flags)).optimizer

    trained = sum(p.nbytes for p in model_on_meta(resolve().model).parameters())
    assert optimizer() == 2 * trained
    assert optimizer("--strategy", "ddp", "--devices", "2") == 3 * trained  # the buckets
    stages = [optimizer("--strategy", f"deepspeed_stage_{stage}", "--devices", "4") for stage in (1, 2)]
    assert stages[0] - stages[1] == trained  # stage 2 keeps no whole gradients


def test_counting_has_no_side_effects():
    state = torch.get_rng_state()
    expect(resolve("--peft", "bone", *COL, "--quant", "int8", "--grad_cp", "1"))
    expect(resolve("--peft", "lora", "--lora_config", '{"dropout":0.1}', "--quant", "nf4"))
    assert torch.equal(torch.get_rng_state(), state)
    weight = torch.randn(4, 64)
    for kind in ("int8", "nf4"):
        assert (QuantizedWeight(weight, kind)[:] - weight).norm() < 0.2 * weight.norm()
    assert lora_linear(torch.ones(1, 4), torch.eye(4), torch.ones(1, 4), torch.ones(4, 1), 1.0).tolist() == [[5.0] * 4]


def test_a_dry_run_of_14b_allocates_nothing(capsys, monkeypatch):
    monkeypatch.setattr(
        startup_summary, "free_bytes", lambda device: None
    )  # otherwise cheaper settings are estimated, too
    shape = "--n_layer 61 --n_embd 4096 --vocab_size 65536 --dry_run --precision bf16 --ctx_len 512".split()
    train_flags([*shape, "--peft", "lora"])
    out = capsys.readouterr().out
    peak = float(out.split("memory  about ")[1].split(" GB")[0])
    assert 40 < peak < 200  # 14 billion elements in fp32 while they are created
    assert "activations and gradients" in out


@pytest.mark.slow
def test_too_little_memory_is_a_warning_with_cheaper_settings(capsys, monkeypatch):
    config = resolve("--peft", "bone", "--bone_config", '{"r":16}')
    assert startup_summary.announce_memory(config, None) == expect(config)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(startup_summary, "free_bytes", lambda device: 10**6)
    monkeypatch.setitem(estimate.PROCESS, "cpu", 0)  # otherwise it hides such a small model
    startup_summary.announce_memory(config, None)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: about ")
    assert warning.count("\n") == 1
    settings = cheaper_settings(config, None, expect(config))
    peaks = {setting.flags: setting.peak for setting in settings}
    fewer = replace(config, data=replace(config.data, micro_bsz=1))
    assert peaks["--micro_bsz 1"] == expect(fewer).peak
    assert list(peaks.values()) == sorted(peaks.values())
    assert all(flags in warning for flags in peaks)


def test_a_failed_estimate_is_reported_and_the_run_continues(capsys, monkeypatch):
    def fail(config, base):
        raise RuntimeError("no fake form of an operator")

    monkeypatch.setattr(startup_summary, "expect", fail)
    assert startup_summary.announce_memory(resolve(), None) is None
    assert "memory could not be estimated: no fake form of an operator" in capsys.readouterr().err


def test_infctx_needs_the_memory_of_one_slice():
    whole = resolve("--peft", "lora", "--ctx_len", "512")
    sliced = resolve("--peft", "lora", "--ctx_len", "512", "--train_type", "infctx", "--chunk_ctx", "64")
    assert expect(sliced).step < 0.3 * expect(whole).step
    assert expect(sliced) == expect(resolve("--peft", "lora", "--ctx_len", "64"))


def test_gradients_of_earlier_micro_batches_exist_during_backward():
    def in_backward(accumulates):
        step = Step(batch=1, tokens=8, accumulates=accumulates)
        return step_tensors._run(model_on_meta(TINY), step)[1]["last blocks"]

    assert in_backward(True) > in_backward(False)


@pytest.mark.parametrize("flags", ["", "--grad_cp 1", "--accumulate_grad_batches 2"])
def test_the_counted_step_equals_a_measured_one(flags, tmp_path, monkeypatch):
    """The second step of a real run, which begins without gradients and with moments, and includes the update."""
    monkeypatch.setattr(step_tensors, "HEAP_SHARE", 1.0)
    peaks, plain = [], TrainingModule.training_step

    def measured(module, *args):
        with LiveBytes() as live:
            live.ignore(module.model.parameters())
            plain(module, *args)
        peaks.append(live.peak)

    monkeypatch.setattr(TrainingModule, "training_step", measured)
    inputs = write_inputs(tmp_path)
    train(tmp_path / "run", inputs, *flags.split())
    config = config_of([*inputs, *COMMON, *flags.split()])
    base = open_base(config)
    counted = expect(config, base).step
    assert counted == pytest.approx(peaks[1], rel=0.03)
