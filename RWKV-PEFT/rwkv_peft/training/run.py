"""A run from a RunConfig to saved weights."""

from __future__ import annotations

import logging
import os
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import say
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.errors import ConfigError
from rwkv_peft.memory.allocator import give_back_freed_pages, keep_freed_pages
from rwkv_peft.memory.estimate import Expected, model_on_its_way, saves_memory
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.ops.wkv6.op import active_backend
from rwkv_peft.report.report import LeavesReport
from rwkv_peft.run_lock import check_unlocked
from rwkv_peft.training.checkpoint.resume import (
    check_inputs,
    check_settings,
    find_checkpoint,
    inputs_of,
    nothing_left,
    start_of,
)
from rwkv_peft.training.distributed.launch import check_launch
from rwkv_peft.training.distributed.strategy import device_type, devices_per_node, world_size
from rwkv_peft.training.fit import fit
from rwkv_peft.training.metrics.loggers import check_loggers
from rwkv_peft.training.metrics.startup_summary import announce_memory, banner, device_line, trained_table
from rwkv_peft.training.model_setup import prepare
from rwkv_peft.training.run_folder import check_folder
from rwkv_peft.training.sample_texts import SampleTexts, read_prompts
from rwkv_peft.training.validation import check_schedule, validation_lines


def run(config: RunConfig) -> None:
    """Train; leaves `rwkv-N.safetensors` (or `.pth`), checkpoints, `config.yaml`, `metrics.jsonl` and `report.html` in
    `--proj_dir`.

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
    if device_type(config.train) == "cpu" and saves_memory(config.train):
        give_back_freed_pages()
    elif device_type(config.train) == "cpu":
        keep_freed_pages()
    folder = Path(config.train.proj_dir)
    check_folder(folder)
    if rank_zero_only.rank == 0 and config.train.num_nodes == 1:  # before what takes time; `fit` takes it
        check_unlocked(folder)
    check_loggers(config.train)
    prompts = read_prompts(config.train)
    checkpoint = find_checkpoint(config.train.resume, folder)
    config = replace(config, train=replace(config.train, resume=""))  # config.yaml is of the run, however it began
    if checkpoint and config.data.random_seed == -1:
        config = _with_seed(config, checkpoint.manifest["settings"]["data"]["random_seed"])
    config = _with_seed(config, _seed(config))
    if checkpoint:
        check_settings(config, checkpoint)
    expected = announce_memory(config)
    prepared = prepare(config, start_of(checkpoint) if checkpoint else None)
    data = BinidxDataModule(config.data, config.model.vocab_size, prepared.tokenizer)
    data.setup()
    if checkpoint:
        check_inputs(inputs_of(prepared.fingerprint, data), checkpoint)
    samples = SampleTexts(prompts, data.meta, config.model.vocab_size)
    backend = active_backend(device_type(config.train), config.train.wkv)
    summary = f"{_banner(config, prepared.model, data, expected)}\n{device_line(config, backend)}"
    say(summary)
    if reason := nothing_left(config, checkpoint):
        say(f"resume  {reason}")
        return
    with LeavesReport(config, summary, trained_table(prepared.model), samples.samples) as report:
        fit(config, prepared, data, checkpoint, [report, samples])


def _dry_run(config: RunConfig) -> None:
    """Print the banner from shapes alone."""
    model = model_on_its_way(config)
    data = BinidxDataModule(config.data, config.model.vocab_size) if config.data.data_file else None
    say(_banner(config, model, data, announce_memory(config)))


def _banner(config: RunConfig, model: RWKV6, data: BinidxDataModule | None, expected: Expected | None) -> str:
    """The banner, which `data` sets up for."""
    if data is None:
        return banner(config, model, None, None, expected)
    data.setup()
    check_schedule(config, data.validation)
    validation = validation_lines(config, data.validation, data.parts)
    return banner(config, model, data.plan(world_size(config.train)), data.meta, expected, validation)


def _with_seed(config: RunConfig, seed: int) -> RunConfig:
    return replace(config, data=replace(config.data, random_seed=seed))


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
