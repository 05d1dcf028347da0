"""A run from a RunConfig to saved weights."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from rwkv_peft.assembly import add_adapter, warm_start
from rwkv_peft.checkpoint import fingerprint, load_base, save_base
from rwkv_peft.config import RunConfig
from rwkv_peft.config_file import write_yaml
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_from_scratch, model_from_state, model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.ops.wkv6 import active_backend
from rwkv_peft.peft.adapter_io import AdapterInfo, adapter_tensors, save_adapter
from rwkv_peft.peft.injection import targeted
from rwkv_peft.peft.lisa import LisaConfig
from rwkv_peft.peft.registry import method_of
from rwkv_peft.training import banner
from rwkv_peft.training.allocator import keep_freed_pages
from rwkv_peft.training.callbacks import MetricsFile, Progress, SaveEveryEpoch, StepRecorder
from rwkv_peft.training.gradients import mean_gradients
from rwkv_peft.training.lisa import BlockDraw
from rwkv_peft.training.loggers import wandb_logger
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.stopping import StopTogether
from rwkv_peft.training.strategy import (
    activation_dtype,
    build_strategy,
    device_type,
    devices_per_node,
    whole_tensors,
)


@dataclass(frozen=True)
class Prepared:
    """A model ready to train."""

    model: RWKV6
    targets: list[str]
    """Layers that carry an adapter."""
    fingerprint: Mapping[str, Any]
    """Of the base."""
    has_adapter: bool
    """Whether something beside the base trains, to be saved as an adapter."""
    tokenizer: Mapping[str, str] | None
    """Identity that the data must have: the warm-start adapter's, where it knows."""
    new_base: Mapping[str, Tensor] | None
    """The base, where it was made here: an adapter is worth nothing without it."""


def run(config: RunConfig) -> None:
    """Train; leaves `rwkv-N.safetensors` (or `.pth`), `config.yaml` and `metrics.jsonl` in `--proj_dir`.

    Raises:
        UserError: anything wrong with a flag or a file, before training begins where it can be known.
    """
    _quiet_lightning()
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
    _say(banner.banner(config, prepared.model, data.plan(_world_size(config)), data.meta))
    _say(banner.device_line(config, active_backend(device_type(config.train), config.train.wkv)))
    _fit(config, prepared, data)


def prepare(config: RunConfig) -> Prepared:
    """Load or make the base, inject, warm-start, mark what trains."""
    path, peft = config.train.load_model, config.peft
    options = _model_options(config)
    if path:
        base = load_base(path)
        model = model_from_state(config.model, base, path, **options)
    else:
        model = model_from_scratch(config.model, config.data.random_seed, **options)
        base = model.state_dict()
    print_of_base = fingerprint(base)
    start = warm_start(peft, print_of_base, path) if peft.peft_config.get("load") else None
    gradients = _gradients(config, model) if start is None else None
    targets = add_adapter(model, peft, start=start, gradients=gradients)
    has_adapter = not method_of(peft.peft).trains_base
    return Prepared(
        model=model,
        targets=targets,
        fingerprint=print_of_base,
        has_adapter=has_adapter,
        tokenizer=start.tokenizer if start else None,
        new_base=base if has_adapter and not path else None,
    )


def _gradients(config: RunConfig, model: RWKV6) -> Mapping[str, Tensor] | None:
    """The targets' weights' gradients on the run's first batches, for a method that starts from them."""
    layer = method_of(config.peft.peft).layer
    if layer is None or not layer.needs_gradient:
        return None
    data = BinidxDataModule(config.data, config.model.vocab_size)
    data.setup()
    count = config.peft.peft_config["samples"]
    _say(f"gradients of the base on {count} samples, for the start of {config.peft.peft}")
    return mean_gradients(model, targeted(model, config.peft), data.first_samples(count))


def _dry_run(config: RunConfig) -> None:
    """Print the banner from shapes alone."""
    model = model_on_meta(config.model, **_model_options(config))
    add_adapter(model, config.peft)
    plan = meta = None
    if config.data.data_file:
        data = BinidxDataModule(config.data, config.model.vocab_size)
        data.setup()
        plan, meta = data.plan(_world_size(config)), data.meta
    _say(banner.banner(config, model, plan, meta))


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
        _open_folder(folder, config, prepared)
        consumers += [MetricsFile(folder / "metrics.jsonl", go_on=config.data.epoch_begin > 0), Progress(total_steps)]
    tokenizer = data.meta.tokenizer if data.meta else prepared.tokenizer

    def save(epoch: int | str) -> None:
        tensors = whole_tensors(to_save(prepared), keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            _say(f"saved {save_trained(folder, epoch, config, prepared, tokenizer, tensors)}")

    stop = StopTogether()
    saver = SaveEveryEpoch(save, config.data.epoch_begin, train.epoch_save)
    trainer.callbacks += [StepRecorder(consumers), saver, stop]
    module = TrainingModule(prepared.model, optim, total_steps, _draw(config))
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:  # how Lightning ends a run on a signal
        if stop.agreed and trainer.global_step:
            save("stopped")
        _say(f"stopped by a signal after step {trainer.global_step} of {total_steps}")
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


def check_folder(folder: Path) -> None:
    """Raise ConfigError where `--proj_dir` cannot be made or written to; makes nothing."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        found = f"{existing}, {'not writable' if existing.is_dir() else 'a file'}"
        raise ConfigError("proj_dir", found=found, expected="a folder to write to")


def _open_folder(folder: Path, config: RunConfig, prepared: Prepared) -> None:
    """Make the run's folder, with its config, and the base where that was made here."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "metrics.jsonl").exists() and not config.data.epoch_begin:
            _say(f"note: {folder} holds an earlier run; its metrics and epochs of the same number are replaced")
        write_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError("proj_dir", what=f"cannot be written: {error}") from error
    if prepared.new_base is not None:
        save_base(prepared.new_base, folder / "rwkv-init.pth")


def to_save(prepared: Prepared) -> Mapping[str, Tensor]:
    """What an epoch trained: the adapter, or the whole model where there is none."""
    return adapter_tensors(prepared.model) if prepared.has_adapter else prepared.model.state_dict(keep_vars=True)


def save_trained(
    folder: Path,
    epoch: int | str,
    config: RunConfig,
    prepared: Prepared,
    tokenizer: Mapping[str, str] | None,
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write the tensors that `to_save` names as an adapter file, or as a model where there is no adapter."""
    peft = config.peft
    if not prepared.has_adapter:
        path = folder / f"rwkv-{epoch}.pth"
        save_base({name: tensor.to(prepared.model.dtype) for name, tensor in tensors.items()}, path)
        return path
    path = folder / f"rwkv-{epoch}.safetensors"
    info = AdapterInfo(
        method=peft.peft,
        options=peft.peft_config,
        targets=prepared.targets,
        quant=peft.quant,
        dtype=str(prepared.model.dtype).removeprefix("torch."),
        fingerprint=prepared.fingerprint,
        tokenizer=tokenizer,
    )
    save_adapter(path, tensors, info)
    return path


def _model_options(config: RunConfig) -> dict[str, Any]:
    return {
        "dtype": activation_dtype(config.train),
        "grad_cp": bool(config.train.grad_cp),
        "wkv_backend": config.train.wkv,
    }


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


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _quiet_lightning() -> None:
    """Lightning's own banner and hints repeat or contradict ours."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (".*num_workers.*", ".*LeafSpec.*", ".*DeepSpeed handles gradient clipping.*"):
        warnings.filterwarnings("ignore", module="pytorch_lightning", message=message)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", module="torch.distributed", category=FutureWarning)
