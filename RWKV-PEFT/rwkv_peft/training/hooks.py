"""Everything that happens around optimizer steps, in order."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl

from rwkv_peft.console import warn
from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.checkpoint.saver import CheckpointSaver
from rwkv_peft.training.metrics.recorder import Recorder
from rwkv_peft.training.sample_texts import SampleTexts
from rwkv_peft.training.signals import StopSignals
from rwkv_peft.training.step import MicroBatch, TrainingModule
from rwkv_peft.training.validation import Validator


class RunHooks(pl.Callback):
    """The only callback of a run. Each method lists what is done, from top to bottom.

    All of it runs on every process, since gathering sharded tensors needs all of them.

    Args:
        save: writes the trained parameters to a file named after an epoch, for example, and prints the path.
        first_epoch: number of the run's first epoch (`--epoch_begin`).
        epochs_done: epochs of this run done before it was resumed.
        epoch_save: save every N epochs, and after the last one.
    """

    def __init__(
        self,
        *,
        recorder: Recorder,
        validator: Validator | None,
        checkpoints: CheckpointSaver,
        signals: StopSignals,
        samples: SampleTexts,
        save: Callable[[int | str], None],
        first_epoch: int,
        epochs_done: int,
        epoch_save: int,
    ) -> None:
        self.recorder, self.validator, self.checkpoints = recorder, validator, checkpoints
        self.signals, self.samples, self.save = signals, samples, save
        self.first_epoch, self.epochs_done, self.epoch_save = first_epoch, epochs_done, epoch_save
        self.made_step = False
        """Whether this process has made a step. Until then, the folder's files may be those of an earlier run."""

    def on_fit_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.checkpoints.check_processes_agree(trainer)

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.signals.install()
        self.checkpoints.restore(trainer, module)
        self.samples.write(trainer, module)
        self.recorder.start()
        if self.validator and not self.validator.has_measured:
            self.validator.validate(trainer, module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: TrainingModule, batch: list[MicroBatch], _: int
    ) -> None:
        # Restored only now, so that start-up cannot change the random numbers that training draws.
        self.checkpoints.restore_random_state(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: TrainingModule, outputs: None, batch: list[MicroBatch], _: int
    ) -> None:
        """After each optimizer step."""
        self.made_step = True
        self.checkpoints.count_batches(len(batch))
        self.recorder.record(trainer, module, batch)
        if self.validator:
            self.validator.after_step(trainer, module)
        stop = self.signals.agree(trainer, module)
        if not trainer.is_last_batch:  # after the last batch, on_train_epoch_end saves and stops
            if self.checkpoints.is_due(trainer, module):
                self.checkpoints.save(trainer, module)
            if stop:
                self._stop(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        is_run_end = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if self.validator and is_run_end:
            self.validator.measure_end(trainer, module)
        self._save_epoch(self.epochs_done + trainer.current_epoch + 1, is_run_end)
        # Saved after the weights: a run that resumes from this checkpoint does not write them again.
        self.checkpoints.save(trainer, module, epoch_ended=trainer.is_last_batch)
        if self.signals.agreed and trainer.current_epoch + 1 < trainer.max_epochs:
            self._stop(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if self.validator:
            self.validator.print_best()
        self.samples.write(trainer, module)
        self.samples.print_report(trainer)

    def _save_epoch(self, done: int, is_run_end: bool) -> None:
        """Save the weights of an epoch.

        If saving fails, training continues with a warning; after the last epoch it is an error.
        """
        if done % self.epoch_save and not is_run_end:
            return
        try:
            self.save(self.first_epoch + done - 1)
        except CheckpointError as error:
            if is_run_end:
                raise
            warn(f"{error} Training continues.")

    def _stop(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Save everything and end the run, on all processes together."""
        self.checkpoints.save(trainer, module)
        self.save("stopped")
        self.signals.stop()
