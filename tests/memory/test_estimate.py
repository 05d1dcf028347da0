"""Expected memory: counted on fake tensors, against sums by hand, whole models, and a process' own growth."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config import flags as cli
from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.memory import estimate as memory
from rwkv_peft.memory import step_tensors as allocations
from rwkv_peft.memory.step_tensors import Ledger, Step
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.ops.low_rank import lora_linear
from rwkv_peft.peft.quantization import QuantizedWeight
from rwkv_peft.training.metrics import startup_summary as banner
from rwkv_peft.training.run import run
from tests.helpers import TINY, lively_model, with_shape, write_base

SHAPE = "--n_layer 6 --n_embd 64 --head_size 32 --dim_att 64 --vocab_size 300 --ctx_len 40 --micro_bsz 3".split()
COL = ["--bone_config", '{"mode":"col","r":16}']


def resolve(*flags: str):
    return cli.resolve(cli.parse_args([*SHAPE, "--dry_run", *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        "--peft bone",
        "--peft bone --grad_cp 1 --precision bf16",
        "--peft lora --peft_targets att head",
        "--peft bone --quant int8",
        "--peft none --grad_cp 1",
        "--peft none --ctx_len 2",  # gradients are larger than what is kept
        "--peft prompt --dataload get",
        "--peft lora --dataload pack --train_parts time ln",
        "--peft bone --strategy deepspeed_stage_2",
    ],
)
def test_all_blocks_are_the_line_through_a_few(flags, monkeypatch):
    config = resolve(*flags.split(), *(["--bone_config", '{"r":16}'] if "bone" in flags else []))
    by_line = memory.expect(config)
    monkeypatch.setattr(allocations, "COUNTED_BLOCKS", (6, 7))
    assert memory.expect(config).step == pytest.approx(by_line.step, rel=1e-3)
    assert memory.expect(config).weights == by_line.weights


def test_blocks_that_differ_are_all_counted():
    everywhere = memory.expect(resolve("--peft", "lora"))
    last = memory.expect(resolve("--peft", "lora", "--peft_targets", "blocks.5.att.*"))
    assert last.optimizer < everywhere.optimizer / 6
    assert last.step < 0.5 * everywhere.step  # nothing is kept below the block that trains


def test_kept_tensors_are_those_that_autograd_keeps():
    """Of a whole real step: every storage that is not a parameter's, once."""
    model = lively_model(TINY)
    add_adapter(model, PeftConfig(peft="lora", peft_config={"r": 8}))
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
        add_adapter(fake, PeftConfig(peft="lora", peft_config={"r": 8}))
        allocations._materialise(fake, torch.device("cpu"))
        ids = torch.empty(2, 24, dtype=torch.int64)
        before = ledger.live - ids.nbytes
        hidden = fake.hidden(ids)[0]
        gc.collect()
        beside = hidden.untyped_storage().nbytes() + ids.nbytes  # not kept, but alive
        assert ledger.live - before == pytest.approx(sum(kept.values()) + beside, rel=0.02)


def test_temporaries_count_and_what_is_freed_does_not():
    ledger = Ledger()
    with torch._subclasses.fake_tensor.FakeTensorMode(), ledger:
        a = torch.empty(1000)
        for _ in range(3):
            a.add_(a * 2)
    assert (ledger.live, ledger.most) == (4000, 8000)
    del a
    assert ledger.live == 0


def base_flags(tmp_path, dtype, *flags):
    path = write_base(tmp_path / "base.pth", with_shape(n_layer=3, vocab_size=300), dtype=dtype)
    return cli.resolve(cli.parse_args(["--load_model", str(path), "--dry_run", "--ctx_len", "8", *flags]))


def test_weights_are_held_in_the_dtype_of_the_run(tmp_path):
    wide = memory.expect(base_flags(tmp_path, torch.float32, "--peft", "prompt"))
    half = memory.expect(base_flags(tmp_path, torch.bfloat16, "--peft", "prompt", "--precision", "bf16"))
    model = model_on_meta(with_shape(n_layer=3, vocab_size=300))
    large = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    vectors = sum(p.numel() for p in model.parameters()) - large
    # The file's bf16 vectors stay mapped beside the model's, which are fp32.
    assert wide.weights - half.weights == 2 * large - 2 * vectors
    assert wide.optimizer == half.optimizer == 2 * 20 * 64 * 4  # two moments of the prompt


def test_a_base_of_another_dtype_is_there_twice_while_it_loads(tmp_path):
    same = memory.expect(base_flags(tmp_path, torch.float32, "--peft", "prompt"))
    other = memory.expect(base_flags(tmp_path, torch.bfloat16, "--peft", "prompt"))
    assert other.loading == pytest.approx(1.5 * same.loading, rel=0.02)
    assert other.weights == same.weights


def test_strategies_share_out(tmp_path):
    def optimizer(*flags):
        return memory.expect(resolve("--peft", "none", *flags)).optimizer

    trained = sum(p.nbytes for p in model_on_meta(resolve().model).parameters())
    assert optimizer() == 2 * trained
    assert optimizer("--strategy", "ddp", "--devices", "2") == 3 * trained  # the buckets
    stages = [optimizer("--strategy", f"deepspeed_stage_{stage}", "--devices", "4") for stage in (1, 2)]
    assert stages[0] - stages[1] == trained  # stage 2 has no whole gradients


def test_counting_leaves_no_trace():
    state = torch.get_rng_state()
    memory.expect(resolve("--peft", "bone", *COL, "--quant", "int8", "--grad_cp", "1"))
    memory.expect(resolve("--peft", "lora", "--lora_config", '{"dropout":0.1}', "--quant", "nf4"))
    assert torch.equal(torch.get_rng_state(), state)
    weight = torch.randn(4, 64)
    for kind in ("int8", "nf4"):
        assert (QuantizedWeight(weight, kind)[:] - weight).norm() < 0.2 * weight.norm()
    assert lora_linear(torch.ones(1, 4), torch.eye(4), torch.ones(1, 4), torch.ones(4, 1), 1.0).tolist() == [[5.0] * 4]


def test_a_dry_run_of_14b_allocates_nothing(capsys, monkeypatch):
    monkeypatch.setattr(banner, "free_bytes", lambda device: None)  # ways out would be counted too
    shape = "--n_layer 61 --n_embd 4096 --vocab_size 65536 --dry_run --precision bf16 --ctx_len 512".split()
    run(cli.resolve(cli.parse_args([*shape, "--peft", "lora"])))
    out = capsys.readouterr().out
    peak = float(out.split("memory  about ")[1].split(" GB")[0])
    assert 40 < peak < 200  # 14 billion numbers in fp32 while they are made
    assert "activations and gradients" in out


def test_too_much_is_warned_of_with_counted_ways_out(capsys, monkeypatch):
    config = resolve("--peft", "bone", "--bone_config", '{"r":16}')
    assert banner.announce_memory(config) == memory.expect(config)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(banner, "free_bytes", lambda device: 10**6)
    monkeypatch.setitem(memory.PROCESS, "cpu", 0)  # so small a model would drown in it
    banner.announce_memory(config)
    out = capsys.readouterr().out
    assert out.startswith("warning: about ")
    assert out.count("\n") == 1
    ways = memory.ways_out(config, memory.expect(config))
    assert "--micro_bsz 1" in [way.flags for way in ways]
    fewer = replace(config, data=replace(config.data, micro_bsz=1))
    assert {way.flags: way.peak for way in ways}["--micro_bsz 1"] == memory.expect(fewer).peak
    assert [way.peak for way in ways] == sorted(way.peak for way in ways)
    assert all(way.flags in out for way in ways)


def test_an_estimate_that_fails_says_so_and_stops_nothing(capsys, monkeypatch):
    def fail(config):
        raise RuntimeError("no fake form of an operator")

    monkeypatch.setattr(banner, "expect", fail)
    assert banner.announce_memory(resolve()) is None
    assert "memory could not be estimated: no fake form of an operator" in capsys.readouterr().out


def test_a_slice_of_a_row_keeps_less():
    whole = resolve("--peft", "lora", "--ctx_len", "512")
    sliced = resolve("--peft", "lora", "--ctx_len", "512", "--train_type", "infctx", "--chunk_ctx", "64")
    assert memory.expect(sliced).step < 0.3 * memory.expect(whole).step
    assert memory.expect(sliced) == memory.expect(resolve("--peft", "lora", "--ctx_len", "64"))


def test_steps_of_several_batches_keep_gradients_in_backward():
    def in_backward(accumulates):
        step = Step(batch=1, tokens=8, accumulates=accumulates)
        return allocations._run(model_on_meta(TINY), step)[1]["last blocks"]

    assert in_backward(True) > in_backward(False)
