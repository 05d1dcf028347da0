"""Every method and every way to save memory, under the strategies: two processes train what one does.

Under ZeRO-3 each method and each way is tested, since that strategy shards the weights that they use. The other
strategies treat all trainable parameters alike, so they are tested with methods whose trainable parameters differ in
kind: adapter matrices, the whole model, blocks that change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from rwkv_peft.base_model import load_base
from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.peft.adapter_file import read_adapter
from tests.helpers import relative_error
from tests.peft.cases import CASES, MODEL_CASES
from tests.training.distributed.pairs import PairRun, in_a_pair
from tests.training.small_runs import SHAPE, metrics, train_flags, write_inputs

STEPS = 3
"""LISA changes its blocks before the third."""
CHUNK = 13
DDP, ZERO_1, ZERO_2, ZERO_3 = "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"
ALL = (DDP, ZERO_1, ZERO_2, ZERO_3)
EVERYWHERE = ("bone row", "lisa", "none", "prompt")
"""Methods that are tested under every strategy."""

PAD, ONLY, PACK = ["--dataload", "pad"], ["--dataload", "only"], ["--dataload", "pack"]
BONE = ["--peft", "bone", "--bone_config", '{"r":16,"mode":"col"}', *PAD]
INFCTX = ["--train_type", "infctx", "--chunk_ctx", str(CHUNK)]
GRAD_CP = ["--grad_cp", "1"]
BONE_CP = ["--bone_impl", "materialized", "--bone_cp", "1"]


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    flags: list[str]
    """Flags of the two processes and of the single process."""
    pair: list[str]
    """Further flags of the pair, which change how the same numbers are computed."""
    strategies: tuple[str, ...]


def method_cases() -> dict[str, Case]:
    """Every method except those with dropout, whose random numbers differ between processes."""
    methods = [(method, options, "none") for method, options in [*CASES, *MODEL_CASES] if not options.get("dropout")]
    methods += [("pissa", {"r": 4}, "nf4"), ("bone", {"r": 16, "mode": "col"}, "int8")]
    cases = {}
    for method, options, quant in methods:
        name = " ".join([method, *(str(value) for key, value in options.items() if key == "mode")])
        flags = ["--peft", method, "--peft_config", json.dumps(options), "--quant", quant, "--dataload", "get"]
        strategies = ALL if name in EVERYWHERE else (ZERO_3,)
        cases[f"{name} {options} {quant}"] = Case(flags, GRAD_CP, strategies)
    return cases


MEMORY_CASES = {
    "bone, blocks and layers recomputed": Case(BONE, [*GRAD_CP, *BONE_CP], (ZERO_3,)),
    "bone, layers recomputed": Case(BONE, BONE_CP, (ZERO_3,)),
    "bone, everything at once": Case(BONE, [*INFCTX, *GRAD_CP, *BONE_CP], (DDP, ZERO_2, ZERO_3)),
    "all weights, packed rows, sliced": Case(PACK, INFCTX, (ZERO_1, ZERO_3)),
    "all weights, rows of different lengths, sliced": Case(ONLY, [*INFCTX, *GRAD_CP], (DDP, ZERO_2, ZERO_3)),
    "prompt, sliced": Case(["--peft", "prompt", *PAD], INFCTX, (ZERO_3,)),
    "state": Case(["--train_type", "state", *PAD], GRAD_CP, ALL),
}


def flags_of(folder: Path, out: str, case: Case, devices: int) -> list[str]:
    """Flags of a run on one or two processes, with two rows in each step: one at a time on each process."""
    accumulate = 2 // devices
    sizes = f"--ctx_len 48 --micro_bsz 1 --epoch_steps {STEPS * accumulate} --accumulate_grad_batches {accumulate}"
    # Without an epsilon, Adam's first steps are as large as the learning rate for every gradient. Those near 0 would
    # show only in which order they were summed.
    rates = "--accelerator cpu --precision fp32 --lr_init 1e-3 --lr_final 1e-3 --adam_eps 1e-4".split()
    return [
        "--load_model", f"{folder}/base.pth", "--data_file", f"{folder}/data", *sizes.split(), *rates, *case.flags,
        "--proj_dir", str(folder / out),
    ]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The files and values that a run produced."""

    losses: list[float]
    grad_norms: list[float]
    tensors: dict[str, Tensor]
    """The saved weights."""


def result_of(folder: Path) -> Result:
    rows = metrics(folder)
    (saved,) = folder.glob("rwkv-0.*")
    tensors = load_base(saved) if saved.suffix == ".pth" else read_adapter(saved)[0]
    return Result([row["loss"] for row in rows], [row["grad_norm"] for row in rows], tensors)


def slices(folder: Path, row: int) -> int:
    """Return the number of slices of a row with one document."""
    config = DataConfig(data_file=f"{folder}/data", ctx_len=48, micro_bsz=1, dataload="only")
    sample = Samples(BinidxReader(f"{folder}/data"), config, SHAPE.vocab_size).sample(config.random_seed, 0, row)
    return -(-len(sample["input_ids"]) // CHUNK)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path):
    """Losses, gradient norms, and the saved tensors."""
    write_inputs(tmp_path)
    assert slices(tmp_path, 0) != slices(tmp_path, 1), "the two processes must have different numbers of slices"
    cases = list({**method_cases(), **MEMORY_CASES}.items())
    for number, (_, case) in enumerate(cases):
        train_flags(flags_of(tmp_path, f"one/{number}", case, devices=1))
    runs = [
        PairRun([*flags_of(tmp_path, f"{strategy}/{number}", case, devices=2), *case.pair, "--strategy", strategy])
        for strategy in ALL
        for number, (_, case) in enumerate(cases)
        if strategy in case.strategies
    ]
    in_a_pair(runs, tmp_path / "runs.json")
    for number, (name, case) in enumerate(cases):
        one = result_of(tmp_path / "one" / str(number))
        assert len(one.losses) == STEPS
        for strategy in case.strategies:
            check(result_of(tmp_path / strategy / str(number)), one, f"{strategy}, {name}")


def check(pair: Result, one: Result, case: str) -> None:
    assert pair.losses == pytest.approx(one.losses, rel=1e-5), case
    assert pair.grad_norms == pytest.approx(one.grad_norms, rel=1e-4), case
    assert list(pair.tensors) == list(one.tensors), case
    for name, tensor in one.tensors.items():
        assert (pair.tensors[name].shape, pair.tensors[name].dtype) == (tensor.shape, tensor.dtype), (case, name)
        assert relative_error(pair.tensors[name], tensor) < 1e-4, (case, name)
