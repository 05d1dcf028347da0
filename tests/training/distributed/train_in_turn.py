"""Started by torchrun (pairs.py): one process of a pair, which makes one run after the other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_peft.config import flags as cli
from rwkv_peft.training.distributed import strategy
from rwkv_peft.training.distributed.launch import leave_group
from rwkv_peft.training.run import run

fit = pl.Trainer.fit


def fit_and_count(trainer: pl.Trainer, *args, **options) -> None:
    """Note in the run's folder how many numbers this process's optimizer holds, moments and fp32 weights."""
    fit(trainer, *args, **options)
    optimizer = trainer.optimizers[0]
    inner = getattr(optimizer, "optimizer", optimizer)
    moments = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    weights = [parameter for group in inner.param_groups for parameter in group["params"]]
    counts = {"moments": sum(t.numel() for t in moments), "weights": sum(p.numel() for p in weights)}
    Path(folder, f"optimizer-{os.environ['RANK']}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    strategy.WHOLE_BELOW = 100  # a tiny model has no matrix that ZeRO-3 would share out of itself
    pl.Trainer.fit = fit_and_count
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        config = cli.resolve(cli.parse_args(flags))
        folder = config.train.proj_dir
        run(config)
    leave_group()
