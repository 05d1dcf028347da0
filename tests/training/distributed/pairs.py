"""Runs made by two processes together, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'RWKV-PEFT'}:{ROOT}"}


@dataclass(frozen=True)
class PairRun:
    """One run of two processes."""

    flags: list[str]
    """Flags of train.py, except --devices."""
    stop_at: int = 0
    """Step during which the second process receives SIGTERM; 0: it receives none."""


def in_a_pair(runs: Sequence[PairRun], file: Path) -> None:
    """Make runs one after another in the same two processes, because starting processes takes longer than a run.

    Each process writes the number of elements in its optimizer to `optimizer-RANK.json` in the run's folder.

    Args:
        runs: in their order.
        file: where to write them for the processes.
    """
    file.write_text(json.dumps([asdict(run) for run in runs]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "tests.training.distributed.train_in_turn", str(file)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
