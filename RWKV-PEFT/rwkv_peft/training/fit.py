"""The training loop: Lightning's Trainer with our step, our hooks, and what they save."""

from __future__ import annotations

import shlex
import signal
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rwkv_peft.config.sections import RunConfig
from rwkv_peft.console import program_name, say
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.data.training_data import TrainingData
from rwkv_peft.devices import device_type, devices_per_node, world_size
from rwkv_peft.files import lock_run_folder
from rwkv_peft.training.checkpoint.file import FOLDER, Checkpoint
from rwkv_peft.training.checkpoint.resume import Position, inputs_of, position_of, settings_of
from rwkv_peft.training.checkpoint.saver import CheckpointSaver, SavePlan
from rwkv_peft.training.distributed.sharding import gather_parameters
from rwkv_peft.training.distributed.strategy import build_strategy
from rwkv_peft.training.hooks import RunHooks
from rwkv_peft.training.metrics.loggers import Consumer, open_consumers
from rwkv_peft.training.metrics.metrics_file import cut_metrics
from rwkv_peft.training.metrics.recorder import Recorder
from rwkv_peft.training.model_setup import Prepared
from rwkv_peft.training.optim.loss_scaling import LossScaling
from rwkv_peft.training.run_folder import open_folder, save_trained, to_save, trained_path
from rwkv_peft.training.sample_texts import SampleTexts
from rwkv_peft.training.signals import StopSignals
from rwkv_peft.training.step import TrainingModule
from rwkv_peft.training.validation import Validator


class Fit:
    """One call of Lightning's Trainer, from the start or a checkpoint to the last epoch.

    Args:
        config: the run's settings, with the model's shape resolved.
        prepared: the model with its adapter, ready to train.
        data: the training data, and the validation set if there is one.
        checkpoint: the checkpoint to resume from; None to start a new run.
        samples: writes the sample texts before and after training.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        data: TrainingData,
        checkpoint: Checkpoint | None,
        samples: SampleTexts,
    ) -> None:
        self.config, self.prepared, self.data, self.checkpoint = config, prepared, data, checkpoint
        self.samples = samples
        self.folder = Path(config.train.proj_dir)
        self.begin = position_of(checkpoint)
        self.tokenizer = data.meta.tokenizer if data.meta else prepared.tokenizer
        self.module = TrainingModule(prepared.model, config, total_steps(config, data), self.begin.step)
        self.trainer = _trainer(config, self.begin)
        self.recorder: Recorder | None = None
        self.validator: Validator | None = None
        self.hooks: RunHooks | None = None

    @property
    def made_step(self) -> bool:
        """Whether this process has made a step. Until then, the folder's files may be those of an earlier run."""
        return self.hooks is not None and self.hooks.made_step

    def run(self) -> None:
        """Train. The main process holds the run folder's lock during training.

        Raises:
            SystemExit: a signal ended the run; the exit code is 128 + its number.
        """
        with lock_run_folder(self.folder) if self.trainer.is_global_zero else nullcontext():
            consumers, seconds = self._open_folder() if self.trainer.is_global_zero else ([], 0.0)
            self.recorder = Recorder(consumers, seconds)
            self.validator = self._validator()
            signals, checkpoints = StopSignals(), self._checkpoints()
            self.hooks = RunHooks(
                recorder=self.recorder,
                validator=self.validator,
                checkpoints=checkpoints,
                signals=signals,
                samples=self.samples,
                save=self.save,
                first_epoch=self.config.data.epoch_begin,
                epochs_done=self.begin.epoch,
                epoch_save=self.config.train.epoch_save,
            )
            self.trainer.callbacks.append(self.hooks)
            self._train(checkpoints, consumers, signals)

    def _train(self, checkpoints: CheckpointSaver, consumers: list[Consumer], signals: StopSignals) -> None:
        trainer, module, finished = self.trainer, self.module, False
        batches = BinidxDataModule(self.data, self.config.optim.accumulate_grad_batches)
        batches.begin_at(self.begin.epoch, self.begin.batch)
        try:
            trainer.fit(module, datamodule=batches)
            finished = True
        except SystemExit:  # how Lightning ends a run on a signal
            finished = bool(signals.agreed)
            say(f"stopped by a signal after step {module.step} of {module.total_steps}")
            if trainer.is_global_zero:  # Lightning kills the main process if another one ends with an error
                checkpoints.close()
                config = shlex.quote(str(self.folder / "config.yaml"))
                say(f"resume with: {program_name('train')} --config {config} --resume auto")
                received = signals.agreed or (signal.SIGTERM if trainer.received_sigterm else signal.SIGINT)
                raise SystemExit(128 + received) from None
        finally:
            with ExitStack() as closing:
                closing.callback(checkpoints.close, must_succeed=finished)
                for consumer in consumers:
                    closing.callback(consumer.close)

    def save(self, name: int | str) -> None:
        """Write the trained parameters to a file named after `name`, and print the path."""
        say(f"saved {self.write(name)}")

    def write(self, name: int | str) -> Path:
        """Write the trained parameters to `rwkv-NAME`, and return the path. All processes must call this together.

        Args:
            name: an epoch's number, "best", or "stopped".
        """
        tensors = gather_parameters(to_save(self.prepared), keep=self.trainer.is_global_zero)
        if self.trainer.is_global_zero:
            save_trained(self.folder, name, self.config, self.prepared, self.tokenizer, tensors)
        return trained_path(self.folder, name, self.prepared)

    def _open_folder(self) -> tuple[list[Consumer], float]:
        """Open the run's folder and everything that consumes events; also return the seconds trained so far."""
        open_folder(self.folder, self.config, self.prepared, self.checkpoint.path if self.checkpoint else None)
        rows: list[dict[str, Any]] = []
        if self.checkpoint or self.config.data.epoch_begin:
            rows = cut_metrics(self.folder / "metrics.jsonl", self.begin.step if self.checkpoint else None)
        consumers = open_consumers(self.config, self.module.total_steps, first_step=self.begin.step, rows=rows)
        return consumers, rows[-1]["time"] if rows and self.checkpoint else 0.0

    def _checkpoints(self) -> CheckpointSaver:
        train = self.config.train
        manifest = {
            "settings": settings_of(self.config),
            "inputs": inputs_of(self.prepared.fingerprint, self.data),
            "tokenizer": self.tokenizer,
        }
        plan = SavePlan(train.save_every, train.save_minutes, train.keep_last, train.patience)
        parts = {"validation": self.validator} if self.validator else {}
        return CheckpointSaver(self.folder / FOLDER, self.prepared.model, manifest, plan, parts, self.checkpoint)

    def _validator(self) -> Validator | None:
        if self.data.validation is None:
            return None
        train = self.config.train
        return Validator(
            self.data.validation,
            every=train.val_every,
            patience=train.patience,
            recorder=self.recorder,
            keep=lambda: self.write("best"),
        )


def total_steps(config: RunConfig, data: TrainingData) -> int:
    """Return the optimizer steps of the whole run. An epoch's last step may have fewer micro-batches."""
    batches = data.plan(world_size(config.train)).steps_per_epoch
    return -(-batches // config.optim.accumulate_grad_batches) * config.data.epoch_count


def _trainer(config: RunConfig, begin: Position) -> pl.Trainer:
    train = config.train
    scaling = LossScaling(device_type(train)) if train.precision == "fp16" else None
    find_unused = config.peft.method.changes_active_blocks
    return pl.Trainer(
        accelerator="gpu" if device_type(train) == "cuda" else "cpu",
        devices=devices_per_node(train),
        num_nodes=train.num_nodes,
        **build_strategy(train, config.optim, precision=scaling, find_unused=find_unused),
        max_epochs=config.data.epoch_count - begin.epoch,
        reload_dataloaders_every_n_epochs=int(begin.batch > 0),  # the first epoch is shorter
        use_distributed_sampler=False,  # the data module shards, in a fixed order
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
