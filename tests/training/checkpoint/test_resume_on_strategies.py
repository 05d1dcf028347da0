"""Two processes under ddp and ZeRO: a stopped run resumes, on as many processes or on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from rwkv_peft.base_model import load_base
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.checkpoint.file import checkpoint_path, read_checkpoint
from tests.helpers import relative_error
from tests.training.distributed.pairs import PairRun, in_a_pair
from tests.training.small_runs import metrics, train_flags, write_inputs

METHODS = {
    "bone": ["--peft", "bone", "--bone_config", '{"r":16}', "--train_parts", "ln"],
    "state": ["--train_type", "state"],
    "lisa": ["--peft", "lisa", "--lisa_config", '{"layers":1,"interval":3}'],
}
"""LISA drops and creates moments during training; step 4 is in the middle of an interval."""
CASES = [
    ("ddp", "bone"),
    ("deepspeed_stage_1", "state"),
    ("deepspeed_stage_2", "bone"),
    ("deepspeed_stage_2", "lisa"),
    ("deepspeed_stage_3", "bone"),
    ("deepspeed_stage_3", "lisa"),
]
STOP = 4
"""The step after which runs are resumed."""
COMMON = (
    "--accelerator cpu --precision fp32 --dataload get --ctx_len 32 --epoch_steps 3 --epoch_count 2 --lr_init 1e-3 "
    "--lr_final 1e-4 --adam_eps 1e-4"
).split()
"""Rows without padding, so that devices have equally many tokens in the loss. The epsilon limits rounding errors."""
ONE, PAIR = ["--micro_bsz", "4"], ["--micro_bsz", "2"]
KEEP = ["--save_every", "1", "--keep_last", "9"]


@pytest.mark.slow
def test_a_run_resumes_on_one_and_two_processes(tmp_path: Path):
    """For each strategy, compare these runs with one of two processes that is not interrupted:

    stopped: two processes, of which the second receives SIGTERM, and which then resume;
    joined: two processes that resume from the checkpoint of one process;
    parted: one process that resumes from the checkpoint of the two.
    """
    common = [*write_inputs(tmp_path), *COMMON]
    for name, method in METHODS.items():
        train_flags([*common, *method, *ONE, *KEEP, "--proj_dir", str(tmp_path / "one" / name)])
    runs = []
    for strategy, name in CASES:
        flags, folder = [*common, *METHODS[name], *PAIR, "--strategy", strategy], tmp_path / strategy / name
        runs += [
            PairRun([*flags, "--proj_dir", str(folder / "whole"), *KEEP]),
            PairRun([*flags, "--proj_dir", str(folder / "stopped")], stop_at=STOP),
            PairRun([*flags, "--proj_dir", str(folder / "stopped"), "--resume", "auto"]),
            PairRun([*flags, "--proj_dir", str(folder / "joined"), "--resume", str(at(tmp_path / "one" / name))]),
        ]
    in_a_pair(runs, tmp_path / "runs.json")
    for strategy, name in CASES:
        folder = tmp_path / strategy / name
        flags = [*common, *METHODS[name], *ONE, "--proj_dir", str(folder / "parted")]
        train_flags([*flags, "--resume", str(at(folder / "whole"))])
        check(folder / "stopped", folder / "whole", 1e-6)
        check(folder / "joined", folder / "whole", 1e-5)
        check(folder / "parted", folder / "whole", 1e-5)
        check_checkpoints(folder / "whole", tmp_path / "one" / name)


def at(folder: Path) -> Path:
    return checkpoint_path(folder / "checkpoints", STOP)


def check_checkpoints(pair: Path, one: Path) -> None:
    """Check that the pair's checkpoint has the full tensors that the single process has."""
    found, expected = (read_checkpoint(at(folder)) for folder in (pair, one))
    assert not set(expected.tensors) - set(found.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].shape == tensor.shape
        assert relative_error(found.tensors[name], tensor) < 1e-3, (pair, name)
    steps = expected.manifest["scalars"]["step"]
    assert {name: found.manifest["scalars"]["step"][name] for name in steps} == steps


def check(folder: Path, reference: Path, bound: float) -> None:
    """Compare metrics and saved weights of two runs."""
    found, expected = metrics(folder), metrics(reference)
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=bound), (folder, a["step"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * bound), (folder, a["step"])
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
    tensors = saved(reference)
    for name, tensor in saved(folder).items():
        assert relative_error(tensor, tensors[name]) < 10 * bound, (folder, name)


def saved(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("rwkv-1.*")
    return load_base(path) if path.suffix == ".pth" else read_adapter(path)[0]
