"""A run from a RunConfig to saved weights."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_peft.assembly import add_adapter
from rwkv_peft.config import RunConfig
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.ops.wkv6 import active_backend
from rwkv_peft.peft.lisa import LisaConfig
from rwkv_peft.training.allocator import keep_freed_pages
from rwkv_peft.training.banner import banner, device_line, say
from rwkv_peft.training.callbacks import MetricsFile, Progress, SaveEveryEpoch, StepRecorder
from rwkv_peft.training.launch import check_launch
from rwkv_peft.training.lisa import BlockDraw
from rwkv_peft.training.loggers import wandb_logger
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.prepare import Prepared, model_options, prepare
from rwkv_peft.training.saving import check_folder, open_folder, save_trained, to_save
from rwkv_peft.training.stopping import StopTogether
from rwkv_peft.training.strategy import (
    build_strategy,
    device_type,
    devices_per_node,
    whole_tensors,
)


def run(config: RunConfig) -> None:
    """Train; leaves `rwkv-N.safetensors` (or `.pth`), `config.yaml` and `metrics.jsonl` in `--proj_dir`.

    Raises:
        UserError: anything wrong with a flag or a file, before training begins where it can be known.
    """
    _quiet_lightning()
    check_launch(devices_per_node(config.train), config.train.num_nodes, os.environ)
    if config.train.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if config.train.dry_run:
        _dry_run(config)
        return
    if device_type(config.train) == "cpu":
        keep_freed_pages()
    check_folder(Path(config.train.proj_dir))
    config = replace(config, data=replace(config.data, random_seed=_seed(config)))
    prepared = prepare(config)
    data = BinidxDataModule(config.data, config.model.vocab_size, prepared.tokenizer)
    data.setup()
    say(banner(config, prepared.model, data.plan(_world_size(config)), data.meta))
    say(device_line(config, active_backend(device_type(config.train), config.train.wkv)))
    _fit(config, prepared, data)


def _dry_run(config: RunConfig) -> None:
    """Print the banner from shapes alone."""
    model = model_on_meta(config.model, **model_options(config))
    add_adapter(model, config.peft)
    plan = meta = None
    if config.data.data_file:
        data = BinidxDataModule(config.data, config.model.vocab_size)
        data.setup()
        plan, meta = data.plan(_world_size(config)), data.meta
    say(banner(config, model, plan, meta))


def _fit(config: RunConfig, prepared: Prepared, data: BinidxDataModule) -> None:
    train, optim = config.train, config.optim
    folder = Path(train.proj_dir)
    batches = data.plan(_world_size(config)).steps_per_epoch
    steps_per_epoch = -(-batches // optim.accumulate_grad_batches)  # an epoch's last step may be of fewer batches
    total_steps = steps_per_epoch * config.data.epoch_count
    trainer = pl.Trainer(
        accelerator="gpu" if device_type(train) == "cuda" else "cpu",
        devices=devices_per_node(train),
        num_nodes=train.num_nodes,
        **build_strategy(train, unused=config.peft.peft == "lisa"),
        max_epochs=config.data.epoch_count,
        accumulate_grad_batches=optim.accumulate_grad_batches,
        gradient_clip_val=optim.grad_clip or None,
        use_distributed_sampler=False,  # the data module shards, in a fixed order
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    consumers = []
    if trainer.is_global_zero:
        consumers = [wandb_logger(train.wandb, config)] if train.wandb else []
        open_folder(folder, config, prepared)
        consumers += [MetricsFile(folder / "metrics.jsonl", go_on=config.data.epoch_begin > 0), Progress(total_steps)]
    tokenizer = data.meta.tokenizer if data.meta else prepared.tokenizer

    def save(epoch: int | str) -> None:
        tensors = whole_tensors(to_save(prepared), keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            say(f"saved {save_trained(folder, epoch, config, prepared, tokenizer, tensors)}")

    stop = StopTogether()
    saver = SaveEveryEpoch(save, config.data.epoch_begin, train.epoch_save)
    trainer.callbacks += [StepRecorder(consumers), saver, stop]
    module = TrainingModule(prepared.model, optim, total_steps, _draw(config))
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:  # how Lightning ends a run on a signal
        if stop.agreed and trainer.global_step:
            save("stopped")
        say(f"stopped by a signal after step {module.step} of {total_steps}")
        if trainer.is_global_zero:  # Lightning kills the main process where another ends with an error
            raise SystemExit(_exit_code(trainer, stop)) from None


def _draw(config: RunConfig) -> BlockDraw | None:
    """What draws the blocks that train, for method LISA."""
    if config.peft.peft != "lisa":
        return None
    return BlockDraw(LisaConfig(**config.peft.peft_config), config.model.n_layer, config.data.random_seed)


def _exit_code(trainer: pl.Trainer, stop: StopTogether) -> int:
    """143 after SIGTERM, 130 after Ctrl-C: the shell's codes for both."""
    return 128 + (stop.agreed or (signal.SIGTERM if trainer.received_sigterm else signal.SIGINT))


def _world_size(config: RunConfig) -> int:
    return devices_per_node(config.train) * config.train.num_nodes


def _seed(config: RunConfig) -> int:
    """`--random_seed`, or one drawn; a run's other processes inherit it from the first in Lightning's variable.

    Raises:
        ConfigError: -1 where another launcher starts the processes, each of which would draw its own.
    """
    seed, inherited = config.data.random_seed, os.environ.get("PL_GLOBAL_SEED")
    if seed == -1 and inherited is None and (config.train.num_nodes > 1 or {"RANK", "SLURM_PROCID"} & set(os.environ)):
        raise ConfigError("random_seed", found="-1 with several launched processes", expected="a number")
    if seed == -1:
        seed = int(inherited or random.SystemRandom().randrange(2**31))
    return pl.seed_everything(seed, verbose=False)


def _quiet_lightning() -> None:
    """Lightning's own banner and hints repeat or contradict ours."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (".*num_workers.*", ".*LeafSpec.*", ".*DeepSpeed handles gradient clipping.*"):
        warnings.filterwarnings("ignore", module="pytorch_lightning", message=message)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", module="torch.distributed", category=FutureWarning)
