"""Training a run, from a RunConfig to saved weights."""

from __future__ import annotations

import logging
import os
import random
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch

from rwkv_peft.base_model import BaseModel
from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import is_main_process, note, say
from rwkv_peft.data.training_data import TrainingData, open_data
from rwkv_peft.devices import device_type, devices_per_node, world_size
from rwkv_peft.errors import ConfigError
from rwkv_peft.files import check_run_folder_is_free
from rwkv_peft.memory.allocator import give_back_freed_pages, keep_freed_pages
from rwkv_peft.memory.estimate import Expected, planned_model, saves_memory
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.ops.wkv6.op import active_backend
from rwkv_peft.report.report import describe_ending, write_report
from rwkv_peft.training.checkpoint.file import Checkpoint
from rwkv_peft.training.checkpoint.resume import (
    check_inputs,
    check_resume_path,
    check_settings,
    find_checkpoint,
    inputs_of,
    position_of,
    reason_finished,
    start_of,
)
from rwkv_peft.training.distributed.launch import check_launch
from rwkv_peft.training.fit import Fit
from rwkv_peft.training.metrics.loggers import check_loggers
from rwkv_peft.training.metrics.startup_summary import (
    announce_memory,
    device_line,
    startup_summary,
    trainable_table,
)
from rwkv_peft.training.model_setup import Prepared, open_base, prepare, resolve_shape
from rwkv_peft.training.run_folder import check_folder, trained_path
from rwkv_peft.training.sample_texts import SampleTexts, read_prompts
from rwkv_peft.training.validation import check_schedule, validation_lines


@dataclass(frozen=True)
class RunResult:
    """Results of a finished run."""

    proj_dir: Path
    """The run's folder."""
    weights: Path | None
    """The trained weights after the last epoch: an adapter (.safetensors), or a .pth for full and state tuning. None
    after --dry_run."""
    best_weights: Path | None
    """The weights with the best validation loss, if there was a validation."""
    steps: int
    """Optimizer steps of the run."""
    loss: float | None
    """Loss of the last step; None if nothing was left to train."""
    best_val_loss: float | None
    """Best validation loss, if there was a validation."""


def train(config: RunConfig) -> RunResult:
    """Train, and write the results to `--proj_dir`.

    These are `rwkv-N.safetensors` (or `.pth`), checkpoints, `config.yaml`, `metrics.jsonl` and `report.html`.

    Example:
        >>> data = DataConfig(data_file="chat.jsonl", data_type="jsonl")
        >>> peft = PeftConfig(method=BoneConfig(r=64))
        >>> config = RunConfig(train=TrainConfig(load_model="base.pth"), peft=peft, data=data)
        >>> rwkv_peft.train(config).weights
        PosixPath('out/rwkv-0.safetensors')

    Args:
        config: the model's shape may be unset; it is then read from the base.
    Raises:
        UserError: a flag or a file is invalid (before training starts, if that can be known), or training failed.
        SystemExit: a signal ended the run.
    """
    _quiet_lightning()
    check_launch(devices_per_node(config.train), config.train.num_nodes, os.environ)
    if config.train.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    prompts = check_files(config)
    if config.train.dry_run:
        return _dry_run(config)
    if not config.data.data_file:
        raise ConfigError("data_file", what="no data to train on", expected="a binidx pair, or JSON")
    _tune_allocator(config)
    folder = Path(config.train.proj_dir)
    if is_main_process() and config.train.num_nodes == 1:  # before anything slow; `Fit` takes the lock
        check_run_folder_is_free(folder)
    checkpoint = find_checkpoint(config.train.resume, folder)
    # So that the saved config.yaml does not contain --resume.
    config = replace(config, train=replace(config.train, resume=""))
    config = _with_seed(config, checkpoint)
    base = open_base(config)
    data = open_data(config.data, _vocab_size(config, base))
    config = resolve_shape(config, base, data.vocab_size)
    if checkpoint:
        check_settings(config, checkpoint)
    expected = announce_memory(config, base)
    prepared = prepare(config, base, data, start_of(checkpoint) if checkpoint else None)
    data.check_tokenizer(prepared.tokenizer, "the adapter's")
    if checkpoint:
        check_inputs(inputs_of(prepared.fingerprint, data), checkpoint)
    samples = SampleTexts(prompts, data.meta, config.model.vocab_size)
    backend = active_backend(device_type(config.train), config.train.wkv)
    summary = f"{_summary(config, prepared.model, data, expected)}\n{device_line(config, backend)}"
    say(summary)
    if reason := reason_finished(config, checkpoint):
        say(f"resume  {reason}")
        return _result(config, prepared, checkpoint)
    return _fit(config, prepared, data, checkpoint, samples, summary)


def check_files(config: RunConfig) -> list[str]:
    """Check what can be checked fast: paths of `--proj_dir` and `--resume`, and the packages of `--logger` and `--wkv`.

    Creates nothing.

    Returns:
        The prompts of `--sample_prompts`.
    Raises:
        UserError: a path or a package is missing, or a file is invalid.
    """
    check_folder(Path(config.train.proj_dir))
    check_loggers(config.train)
    check_resume_path(config.train.resume)
    if config.train.wkv == "fla":
        active_backend(device_type(config.train), config.train.wkv)
    return read_prompts(config.train)


def _fit(
    config: RunConfig,
    prepared: Prepared,
    data: TrainingData,
    checkpoint: Checkpoint | None,
    samples: SampleTexts,
    summary: str,
) -> RunResult:
    """Train, and write the report even if training fails."""
    fit, ending = Fit(config, prepared, data, checkpoint, samples), "finished"
    table = trainable_table(prepared.model)  # before ZeRO-3 shards the parameters
    try:
        fit.run()
    except BaseException as error:
        ending = describe_ending(error)
        raise
    finally:
        if fit.made_step and is_main_process():
            _write_report(config, summary, table, samples, ending)
    return _result(config, prepared, checkpoint, fit)


def _write_report(config: RunConfig, summary: str, table: str, samples: SampleTexts, ending: str) -> None:
    """Write report.html. If that fails, the run's result is not affected."""
    folder, devices = Path(config.train.proj_dir), world_size(config.train)
    try:
        write_report(folder, config, summary, table, samples.samples, ending, devices=devices)
    except Exception as error:  # a broken report must not end the run
        note(f"report.html was not written: {type(error).__name__}: {' '.join(str(error).split())}")


def _result(config: RunConfig, prepared: Prepared, checkpoint: Checkpoint | None, fit: Fit | None = None) -> RunResult:
    folder, validator = Path(config.train.proj_dir), fit.validator if fit else None
    last_epoch = config.data.epoch_begin + config.data.epoch_count - 1
    weights = trained_path(folder, last_epoch, prepared)
    return RunResult(
        proj_dir=folder,
        weights=weights if weights.exists() else None,
        best_weights=validator.best_path if validator else None,
        steps=fit.module.step if fit else position_of(checkpoint).step,
        loss=fit.recorder.last_loss if fit else None,
        best_val_loss=validator.best_loss if validator else None,
    )


def _dry_run(config: RunConfig) -> RunResult:
    """Print the start-up summary without allocating the model."""
    base = open_base(config)
    data = open_data(config.data, _vocab_size(config, base)) if config.data.data_file else None
    config = resolve_shape(config, base, data.vocab_size if data else 0)
    say(_summary(config, planned_model(config, base), data, announce_memory(config, base)))
    return RunResult(Path(config.train.proj_dir), None, None, 0, None, None)


def _vocab_size(config: RunConfig, base: BaseModel | None) -> int:
    """Return the vocabulary size that the data must fit; 0 if the data decides it."""
    return base.shape.vocab_size if base is not None else config.model.vocab_size


def _summary(config: RunConfig, model: RWKV6, data: TrainingData | None, expected: Expected | None) -> str:
    if data is None:
        return startup_summary(config, model, None, None, expected)
    check_schedule(config, data.validation)
    validation = validation_lines(config, data.validation, data.parts)
    return startup_summary(config, model, data.plan(world_size(config.train)), data.meta, expected, validation)


def _tune_allocator(config: RunConfig) -> None:
    """On a CPU, keep freed memory (faster), or return it to the system if the run is set to save memory."""
    if device_type(config.train) != "cpu":
        return
    if saves_memory(config.train):
        give_back_freed_pages()
    else:
        keep_freed_pages()


def _with_seed(config: RunConfig, checkpoint: Checkpoint | None) -> RunConfig:
    """Seed all random generators. `--random_seed -1` takes the checkpoint's seed, or draws one.

    The run's other processes inherit a drawn seed from process 0 in Lightning's environment variable.

    Raises:
        ConfigError: -1, although a launcher starts several processes, each of which would draw its own seed.
    """
    seed, inherited = config.data.random_seed, os.environ.get("PL_GLOBAL_SEED")
    if seed == -1 and checkpoint:
        seed = checkpoint.manifest["settings"]["data"]["random_seed"]
    if seed == -1 and inherited is None and (config.train.num_nodes > 1 or {"RANK", "SLURM_PROCID"} & set(os.environ)):
        raise ConfigError("random_seed", found="-1 with several launched processes", expected="a number")
    if seed == -1:
        seed = int(inherited or random.SystemRandom().randrange(2**31))
    return replace(config, data=replace(config.data, random_seed=pl.seed_everything(seed, verbose=False)))


def _quiet_lightning() -> None:
    """Silence Lightning's own messages, which repeat or contradict ours."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (".*num_workers.*", ".*LeafSpec.*", ".*DeepSpeed handles gradient clipping.*"):
        warnings.filterwarnings("ignore", module="pytorch_lightning", message=message)
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 is about to remove.
    warnings.filterwarnings("ignore", module="torch.distributed", category=FutureWarning)
