"""Two processes under ddp and ZeRO: a run that was stopped goes on, with as many processes or with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from rwkv_peft.base_model import load_base
from rwkv_peft.config import flags as cli
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.checkpoint.file import read_checkpoint
from rwkv_peft.training.run import run
from tests.helpers import relative_error
from tests.training.small_runs import write_inputs

ROOT = Path(__file__).resolve().parents[3]
METHODS = {
    "bone": ["--peft", "bone", "--bone_config", '{"r":16}', "--train_parts", "ln"],
    "state": ["--train_type", "state"],
    "lisa": ["--peft", "lisa", "--lisa_config", '{"layers":1,"interval":3}'],
}
"""LISA drops and makes moments as it goes; step 4 is in the middle of a draw."""
STRATEGIES = ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
WITH_ALL = ["deepspeed_stage_2", "deepspeed_stage_3"]
STOP = 4
COMMON = (
    "--accelerator cpu --precision fp32 --dataload get --ctx_len 32 --epoch_steps 3 --epoch_count 2 --lr_init 1e-3 "
    "--lr_final 1e-4 --adam_eps 1e-4"
).split()
"""Rows without padding: as many trained tokens on each device. The epsilon keeps rounding small, as it is."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("strategies"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pair_goes_on(strategy, inputs, tmp_path):
    """As the pair that was not stopped, within 1e-6; then one process from the pair's checkpoint, and the pair from the
    one's."""
    pair = ["--devices", "2", "--micro_bsz", "2", "--strategy", strategy]
    alone, keep = ["--micro_bsz", "4"], ["--save_every", "1", "--keep_last", "9"]
    common = [*inputs, *COMMON]
    methods = METHODS if strategy in WITH_ALL else {"bone": METHODS["bone"]}
    for name, method in methods.items():
        run_here(
            [
                *common,
                *method,
                *alone,
                *keep,
                "--proj_dir",
                str(tmp_path / name / "alone"),
            ]
        )
    runs = []
    for name, method in methods.items():
        flags, folder = [*common, *method, *pair], tmp_path / name
        runs += [
            [[*flags, "--proj_dir", str(folder / "whole"), *keep], 0],
            [[*flags, "--proj_dir", str(folder / "stopped")], STOP],
            [[*flags, "--proj_dir", str(folder / "stopped"), "--resume", "auto"], 0],
            [[*flags, "--proj_dir", str(folder / "joined"), "--resume", checkpoint(folder / "alone")], 0],
        ]
    in_a_pair(runs, tmp_path / "runs.json")
    for name, method in methods.items():
        folder = tmp_path / name
        run_here(
            [*common, *method, *alone, "--proj_dir", str(folder / "parted"), "--resume", checkpoint(folder / "whole")]
        )
        check(folder / "stopped", folder / "whole", 1e-6)
        for other in ("joined", "parted"):
            check(folder / other, folder / "whole", 1e-5)
        assert_same_state(folder)


def checkpoint(folder: Path) -> str:
    return str(folder / "checkpoints" / f"step-{STOP:06d}.safetensors")


def assert_same_state(folder: Path) -> None:
    """A pair's checkpoint has the whole tensors that one process's has."""
    pair, one = (read_checkpoint(Path(checkpoint(folder / name))) for name in ("whole", "alone"))
    missing = set(one.tensors) - set(pair.tensors)
    assert not missing
    for name, tensor in one.tensors.items():
        assert pair.tensors[name].shape == tensor.shape
        assert relative_error(pair.tensors[name], tensor) < 1e-3, name
    steps = one.manifest["scalars"]["step"]
    assert {name: pair.manifest["scalars"]["step"][name] for name in steps} == steps


def check(folder: Path, reference: Path, bound: float) -> None:
    found, expected = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, reference)
    )
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=bound)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * bound)
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
    tensors = saved(reference)
    for name, tensor in saved(folder).items():
        assert relative_error(tensor, tensors[name]) < 10 * bound, name


def saved(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("rwkv-1.*")
    return load_base(path) if path.suffix == ".pth" else read_adapter(path)[0]


def run_here(flags: list[str]) -> None:
    run(cli.resolve(cli.parse_args(flags)))


def in_a_pair(runs: list, file: Path) -> None:
    """One pair of processes makes all runs in turn; starting it takes longer than a run."""
    file.write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "tests/training/checkpoint/resume_in_turn.py", str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "RWKV-PEFT")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
