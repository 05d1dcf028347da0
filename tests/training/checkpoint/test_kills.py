"""Runs that are killed and resumed: losses and adapter equal those of an uninterrupted run, bit for bit."""

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
FAST = 4
"""Kills that are not marked slow: each of KINDS, half of them while a file is written."""
COMMON = (
    "--accelerator cpu --dataload pad --ctx_len 32 --micro_bsz 2 --epoch_steps 8 --epoch_count 2 --lr_init 1e-3 "
    "--lr_final 1e-4 --accumulate_grad_batches 2 --save_every 1"
).split()
"""8 steps, with a checkpoint after each."""
KILLS = [*range(FAST), *(pytest.param(number, marks=pytest.mark.slow) for number in range(FAST, 50))]
"""Numbers of the kills. Each seeds the random choice of its moment."""


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

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


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_resumes_exactly(kill, warm, references, tmp_path):
    """Odd kills come while a file is written, even ones at any time. Some runs are killed again after they resumed."""
    draw = random.Random(kill)
    reference = references[list(KINDS)[kill % len(KINDS)]]
    flags = [*reference.flags, "--proj_dir", str(tmp_path / "run"), "--resume", "auto"]
    while not killed(kill, draw, warm, flags, reference.step_seconds, tmp_path / "log"):
        shutil.rmtree(tmp_path / "run")  # it ended before the kill
    if draw.random() < 0.3:
        killed(kill, draw, warm, flags, reference.step_seconds, tmp_path / "log")
    assert warm.run(flags, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    compare(tmp_path / "run", reference.folder)


def killed(kill: int, draw: random.Random, warm: Warm, flags: list[str], seconds: float, log: Path) -> bool:
    """Start or resume a run and kill it.

    Args:
        kill: number of the kill; odd ones come while a file is written.
        seconds: upper limit of the time between a step and the kill.
    Returns:
        Whether the run was killed; otherwise it ended before.
    """
    if kill % 2:
        call, most = draw.choice([("write", 300), ("write", 300), ("fsync", 18), ("replace", 10), ("unlink", 12)])
        code = warm.run(flags, log, die_at=(call, draw.randint(1, most)))
    else:
        pid = warm.start(flags, log)
        wait_for_lines(pid, Path(flags[flags.index("--proj_dir") + 1]) / "metrics.jsonl", draw.randint(0, 7))
        time.sleep(draw.uniform(0, seconds))
        with suppress(ProcessLookupError):  # it has ended
            os.kill(pid, signal.SIGKILL)
        code = warm.wait()
    assert code in (-signal.SIGKILL, 0), log.read_text()
    return code != 0


def wait_for_lines(pid: int, metrics: Path, count: int) -> None:
    """Wait until so many steps are in metrics.jsonl, or the process has ended."""
    while os.path.exists(f"/proc/{pid}"):
        with suppress(FileNotFoundError):
            if metrics.read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.002)


def compare(folder: Path, reference: Path) -> None:
    """Check that metrics (except times) and adapters are equal, and that at most one old checkpoint was not deleted."""
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
