"""Runs that are killed and go on: the losses and the adapter are those of a run that was not, bit for bit.

Six kills by default, fifty with `--all-kills` (`make test-slow`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rwkv_peft.peft.adapter_file import read_adapter
from tests.training.runs_in_children import Warm
from tests.training.small_runs import write_inputs

KINDS = {
    "bone_fp32": ["--peft", "bone", "--bone_config", '{"r":16}', "--precision", "fp32"],
    "lora_dropout_bf16": ["--peft", "lora", "--lora_config", '{"r":4,"dropout":0.2}', "--precision", "bf16"],
    "bone_bf16": ["--peft", "bone", "--bone_config", '{"r":16,"mode":"col"}', "--precision", "bf16"],
}
COMMON = (
    "--accelerator cpu --dataload pad --ctx_len 32 --micro_bsz 2 --epoch_steps 8 --epoch_count 2 --lr_init 1e-3 "
    "--lr_final 1e-4 --accumulate_grad_batches 2 --save_every 1"
).split()
"""8 steps, a checkpoint at each."""


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to."""

    flags: list[str]
    step_seconds: float
    folder: Path


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as process:
        yield process


@pytest.fixture(scope="module")
def references(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("kills")
    inputs = write_inputs(folder)
    made = {}
    for kind, flags in KINDS.items():
        everything = [*inputs, *COMMON, *flags]
        assert warm.run([*everything, "--proj_dir", str(folder / kind)], folder / f"{kind}.log") == 0
        times = values(folder / kind, "time")
        made[kind] = Reference(everything, (times[-1] - times[0]) / 7, folder / kind)
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(50 if metafunc.config.getoption("all_kills") else 6))


def test_a_killed_run_goes_on_as_if_nothing_had_been(kill, warm, references, tmp_path):
    """Every other kill comes while a file is written, the rest at any moment; some runs are killed again."""
    draw = random.Random(kill)
    reference = references[list(KINDS)[kill % len(KINDS)]]
    flags = [*reference.flags, "--proj_dir", str(tmp_path / "run"), "--resume", "auto"]
    while not killed(kill, draw, warm, flags, reference.step_seconds, tmp_path / "log"):
        shutil.rmtree(tmp_path / "run")  # it was done before
    if draw.random() < 0.3:
        killed(kill, draw, warm, flags, reference.step_seconds, tmp_path / "log")
    assert warm.run(flags, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    compare(tmp_path / "run", reference.folder)


def killed(kill: int, draw: random.Random, warm: Warm, flags: list[str], seconds: float, log: Path) -> bool:
    """Begin or go on, and kill, up to `seconds` after some step; False where the run ended first."""
    if kill % 2:
        call, most = draw.choice([("write", 300), ("write", 300), ("fsync", 18), ("replace", 10), ("unlink", 12)])
        code = warm.run(flags, log, die_at=(call, draw.randint(1, most)))
    else:
        pid = warm.start(flags, log)
        wait_for_lines(pid, Path(flags[flags.index("--proj_dir") + 1]) / "metrics.jsonl", draw.randint(0, 7))
        time.sleep(draw.uniform(0, seconds))
        with suppress(ProcessLookupError):  # ended
            os.kill(pid, signal.SIGKILL)
        code = warm.wait()
    assert code in (-signal.SIGKILL, 0), log.read_text()
    return code != 0


def wait_for_lines(pid: int, metrics: Path, count: int) -> None:
    """Until so many steps are written down, or the process has ended."""
    while os.path.exists(f"/proc/{pid}"):
        with suppress(FileNotFoundError):
            if metrics.read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.002)


def compare(folder: Path, reference: Path) -> None:
    """The same metrics but for times, the same adapters, and no more files than one that a kill kept from going."""
    for name in ("step", "loss", "lr", "tokens", "grad_norm"):
        assert values(folder, name) == values(reference, name), name
    for file in ("rwkv-0.safetensors", "rwkv-1.safetensors"):
        (found, _), (expected, _) = read_adapter(folder / file), read_adapter(reference / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names - {"step-000006.safetensors"} == {"lock", "step-000007.safetensors", "step-000008.safetensors"}


def values(folder: Path, name: str) -> list:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]
