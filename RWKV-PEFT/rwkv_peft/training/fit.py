"""Training itself: the trainer, what watches it, and what is saved while and after it runs."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytorch_lightning as pl

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import say
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.peft.methods.lisa import LisaConfig
from rwkv_peft.run_lock import only_run_in
from rwkv_peft.training.checkpoint.callback import Checkpointer, Due
from rwkv_peft.training.checkpoint.file import FOLDER, Checkpoint
from rwkv_peft.training.checkpoint.resume import inputs_of, position_of, settings_of
from rwkv_peft.training.distributed.strategy import (
    build_strategy,
    device_type,
    devices_per_node,
    whole_tensors,
    world_size,
)
from rwkv_peft.training.metrics.loggers import Consumer, open_consumers
from rwkv_peft.training.metrics.recorder import SaveEveryEpoch, StepRecorder, cut_metrics
from rwkv_peft.training.model_setup import Prepared
from rwkv_peft.training.module import TrainingModule
from rwkv_peft.training.optim.lisa import BlockDraw
from rwkv_peft.training.run_folder import open_folder, save_trained, to_save, trained_path
from rwkv_peft.training.signals import StopTogether
from rwkv_peft.training.validation import Validator


def fit(
    config: RunConfig,
    prepared: Prepared,
    data: BinidxDataModule,
    checkpoint: Checkpoint | None,
    watchers: Sequence[pl.Callback],
) -> None:
    """Train from the beginning or from a checkpoint to the last epoch.

    Args:
        watchers: callbacks that come before ours.
    """
    optim, begin = config.optim, position_of(checkpoint)
    batches = data.plan(world_size(config.train)).steps_per_epoch
    steps_per_epoch = -(-batches // optim.accumulate_grad_batches)  # an epoch's last step may be of fewer batches
    data.begin_at(begin.epoch, begin.batch)
    trainer = _trainer(config, config.data.epoch_count - begin.epoch, begins_within=begin.batch > 0)
    module = TrainingModule(prepared.model, optim, steps_per_epoch * config.data.epoch_count, _draw(config))
    module.first_step = begin.step
    module.chunk, module.full_bptt = config.train.slice_tokens, config.train.infctx_bptt == "full"
    trainer.callbacks += watchers
    with only_run_in(Path(config.train.proj_dir)) if trainer.is_global_zero else nullcontext():
        _train(config, prepared, data, checkpoint, trainer, module)


def _trainer(config: RunConfig, epochs: int, *, begins_within: bool) -> pl.Trainer:
    train = config.train
    return pl.Trainer(
        accelerator="gpu" if device_type(train) == "cuda" else "cpu",
        devices=devices_per_node(train),
        num_nodes=train.num_nodes,
        **build_strategy(train, unused=config.peft.peft == "lisa"),
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=int(begins_within),  # the first epoch is shorter
        accumulate_grad_batches=config.optim.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip or None,
        use_distributed_sampler=False,  # the data module shards, in a fixed order
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _train(
    config: RunConfig,
    prepared: Prepared,
    data: BinidxDataModule,
    checkpoint: Checkpoint | None,
    trainer: pl.Trainer,
    module: TrainingModule,
) -> None:
    """Fit, with all that watches and saves; the main process holds the folder's lock."""
    train, begin, folder = config.train, position_of(checkpoint), Path(config.train.proj_dir)
    consumers, seconds = [], 0.0
    if trainer.is_global_zero:
        open_folder(folder, config, prepared, checkpoint.path if checkpoint else None)
        consumers, seconds = _consumers(config, module, checkpoint)
    tokenizer = data.meta.tokenizer if data.meta else prepared.tokenizer

    def write(name: int | str) -> Path:
        tensors = whole_tensors(to_save(prepared), keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_trained(folder, name, config, prepared, tokenizer, tensors)
        return trained_path(folder, name, prepared)

    def save(name: int | str) -> None:
        say(f"saved {write(name)}")

    about = {
        "settings": settings_of(config),
        "inputs": inputs_of(prepared.fingerprint, data),
        "tokenizer": tokenizer,
    }
    due = Due(train.save_every, train.save_minutes, train.keep_last, train.patience)
    checkpointer = Checkpointer(folder / FOLDER, prepared.model, about, due, checkpoint)

    def save_stopped(trainer: pl.Trainer, module: TrainingModule) -> None:
        checkpointer.save(trainer, module)
        save("stopped")

    stop = StopTogether(save_stopped)
    saver = SaveEveryEpoch(save, config.data.epoch_begin, train.epoch_save, begin.epoch)
    recorder = StepRecorder(consumers, seconds)
    validator = _validator(config, data, recorder, lambda: write("best"))
    trainer.callbacks += [recorder, saver, *validator, checkpointer, stop]
    checkpointer.restore(trainer.callbacks)
    finished = False
    try:
        trainer.fit(module, datamodule=data)
        finished = True
    except SystemExit:  # how Lightning ends a run on a signal
        finished = bool(stop.agreed)
        say(f"stopped by a signal after step {module.step} of {module.total_steps}")
        if trainer.is_global_zero:  # Lightning kills the main process where another ends with an error
            checkpointer.close()
            say(f"go on with: python train.py --config {shlex.quote(str(folder / 'config.yaml'))} --resume auto")
            raise SystemExit(_exit_code(trainer, stop)) from None
    finally:
        with ExitStack() as closing:
            closing.callback(checkpointer.close, must=finished)
            for consumer in consumers:
                closing.callback(consumer.close)


def _validator(
    config: RunConfig, data: BinidxDataModule, recorder: StepRecorder, keep: Callable[[], Path]
) -> list[Validator]:
    """The callback that validates, where there is something to validate on."""
    if data.validation is None:
        return []
    train = config.train
    return [Validator(data.validation, every=train.val_every, patience=train.patience, recorder=recorder, keep=keep)]


def _consumers(
    config: RunConfig, module: TrainingModule, checkpoint: Checkpoint | None
) -> tuple[list[Consumer], float]:
    """What takes the run's events, with what it has of earlier processes; and the seconds that these trained."""
    step = position_of(checkpoint).step
    rows = []
    if checkpoint or config.data.epoch_begin:
        rows = cut_metrics(Path(config.train.proj_dir) / "metrics.jsonl", step if checkpoint else None)
    consumers = open_consumers(config, module.total_steps, first_step=step, rows=rows)
    return consumers, rows[-1]["time"] if rows and checkpoint else 0.0


def _draw(config: RunConfig) -> BlockDraw | None:
    """What draws the blocks that train, for method LISA."""
    if config.peft.peft != "lisa":
        return None
    return BlockDraw(LisaConfig(**config.peft.peft_config), config.model.n_layer, config.data.random_seed)


def _exit_code(trainer: pl.Trainer, stop: StopTogether) -> int:
    """143 after SIGTERM, 130 after Ctrl-C: the shell's codes for both."""
    return 128 + (stop.agreed or (signal.SIGTERM if trainer.received_sigterm else signal.SIGINT))
