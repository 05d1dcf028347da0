"""What saves memory, under every strategy: two processes that slice and recompute train what one plain process does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from rwkv_peft.config import flags as cli
from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.training.run import run
from tests.helpers import relative_error
from tests.training.distributed.test_methods_on_strategies import STRATEGIES, in_a_pair, result_of
from tests.training.small_runs import SHAPE, write_inputs

STEPS = 2
CHUNK = 13
INFCTX = ["--train_type", "infctx", "--chunk_ctx", str(CHUNK)]
GRAD_CP = ["--grad_cp", "1"]
BONE_CP = ["--bone_impl", "materialized", "--bone_cp", "1"]
BONE = ["--peft", "bone", "--bone_config", '{"r":16,"mode":"col"}']
PAD = ["--dataload", "pad"]


@dataclass(frozen=True)
class Case:
    """One run: what both have, and what the pair has beside."""

    both: list[str]
    saving: list[str]


CASES = {
    "bone, blocks and layers recomputed": Case([*BONE, *PAD], [*GRAD_CP, *BONE_CP]),
    "bone, layers recomputed": Case([*BONE, *PAD], BONE_CP),
    "bone, all at once": Case([*BONE, *PAD], [*INFCTX, *GRAD_CP, *BONE_CP]),
    "all weights, packed rows, sliced": Case(["--dataload", "pack"], INFCTX),
    "all weights, rows of different lengths, sliced": Case(["--dataload", "only"], [*INFCTX, *GRAD_CP]),
    "prompt, sliced": Case(["--peft", "prompt", *PAD], INFCTX),
    "state": Case(["--train_type", "state", *PAD], GRAD_CP),
}


def flags_of(folder: Path, out: str, case: Case, devices: int) -> list[str]:
    """Of a run on one or two processes, which takes two rows a step, one at a time each."""
    accumulate = 2 // devices
    sizes = f"--ctx_len 48 --micro_bsz 1 --epoch_steps {STEPS * accumulate} --accumulate_grad_batches {accumulate}"
    # An epsilon above rounding, as in test_methods_on_strategies.
    rates = "--accelerator cpu --precision fp32 --lr_init 1e-3 --lr_final 1e-3 --adam_eps 1e-4".split()
    return [
        "--load_model", f"{folder}/base.pth", "--data_file", f"{folder}/data", *sizes.split(), *rates, *case.both,
        "--proj_dir", str(folder / out),
    ]  # fmt: skip


def slices(folder: Path, row: int) -> int:
    """Of a row of one document."""
    config = DataConfig(data_file=f"{folder}/data", ctx_len=48, micro_bsz=1, dataload="only")
    sample = Samples(BinidxReader(f"{folder}/data"), config, SHAPE.vocab_size).sample(config.random_seed, 0, row)
    return -(-len(sample["input_ids"]) // CHUNK)


@pytest.mark.slow
def test_two_processes_that_save_memory_train_what_one_does(tmp_path):
    write_inputs(tmp_path)
    assert slices(tmp_path, 0) != slices(tmp_path, 1), "the processes have different numbers of slices"
    for number, case in enumerate(CASES.values()):
        run(cli.resolve(cli.parse_args(flags_of(tmp_path, f"alone/{number}", case, devices=1))))
    in_a_pair(
        [
            [*flags_of(tmp_path, f"{strategy}/{number}", case, devices=2), *case.saving, "--devices", "2",
             "--strategy", strategy]
            for strategy in STRATEGIES
            for number, case in enumerate(CASES.values())
        ],
        tmp_path / "runs.json",
    )  # fmt: skip
    for strategy in STRATEGIES:
        for number, name in enumerate(CASES):
            pair, one = (result_of(tmp_path / out / str(number)) for out in (strategy, "alone"))
            assert len(one.losses) == STEPS
            assert pair.losses == pytest.approx(one.losses, rel=1e-5), (strategy, name)
            assert pair.grad_norms == pytest.approx(one.grad_norms, rel=1e-4), (strategy, name)
            assert list(pair.tensors) == list(one.tensors)
            for key, tensor in one.tensors.items():
                assert relative_error(pair.tensors[key], tensor) < 1e-4, (strategy, name, key)
