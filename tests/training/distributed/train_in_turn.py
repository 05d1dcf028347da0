"""One process of a pair, started by torchrun (pairs.py): it makes one run after another."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_peft.training.distributed import deepspeed_strategy
from rwkv_peft.training.distributed.launch import leave_group
from rwkv_peft.training.distributed.sharding import inner_optimizer
from rwkv_peft.training.metrics.recorder import Recorder
from tests.training.small_runs import train_flags

fit, record = pl.Trainer.fit, Recorder.record


def main(file: Path) -> None:
    deepspeed_strategy.UNSHARDED_BELOW = 100  # otherwise ZeRO-3 would not shard the matrices of a tiny model
    for run in json.loads(file.read_text()):
        make(run["flags"], run["stop_at"])
        torch.distributed.barrier()  # the first process may still be writing a checkpoint
    leave_group()


def make(flags: list[str], stop_at: int) -> None:
    """Make one run, and check that it ended as expected."""
    folder = Path(flags[flags.index("--proj_dir") + 1])

    def fit_and_count(trainer: pl.Trainer, *args, **options) -> None:
        fit(trainer, *args, **options)
        write_counts(trainer, folder)

    def record_and_stop(recorder: Recorder, trainer: pl.Trainer, module: pl.LightningModule, batches: list) -> None:
        record(recorder, trainer, module, batches)
        if module.step == stop_at and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    pl.Trainer.fit, Recorder.record = fit_and_count, record_and_stop
    code = 0
    try:
        train_flags([*flags, "--devices", "2"])
    except SystemExit as end:  # in the main process
        code = end.code
    assert code in ((0, 143) if stop_at else (0,)), code


def write_counts(trainer: pl.Trainer, folder: Path) -> None:
    """Write how many elements this process's optimizer has: moments and fp32 weights."""
    inner = inner_optimizer(trainer.optimizers[0])
    moments = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    weights = [parameter for group in inner.param_groups for parameter in group["params"]]
    counts = {"moments": sum(t.numel() for t in moments), "weights": sum(p.numel() for p in weights)}
    (folder / f"optimizer-{os.environ['RANK']}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
