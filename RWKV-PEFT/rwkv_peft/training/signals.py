"""Stopping a run by a signal, so that what it trained can be saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_peft.training.metrics.recorder import StepCallback
from rwkv_peft.training.module import TrainingModule


class StopTogether(StepCallback):
    """Ends training on SIGTERM or Ctrl-C, in every process after the same step. A second Ctrl-C does not wait for it.

    Lightning by itself stops a process where its signal finds it, while others may wait for it in a collective, and
    after Ctrl-C kills the others, with what ZeRO-3 has shared out to them.

    Args:
        save: called on every process before it stops, after the end of an epoch or within one.
    """

    def __init__(self, save: Callable[[pl.Trainer, TrainingModule], None]) -> None:
        super().__init__()
        self.save = save
        self.agreed = 0
        """The signal on which all processes stopped; 0 where none has come."""
        self._noted = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """In place of Lightning's handlers; Lightning puts back those of before when it is done."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = number

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        noted = torch.tensor(self._noted, device=module.device)
        self.agreed = int(trainer.strategy.reduce(noted, reduce_op="max"))
        if self.agreed and not trainer.is_last_batch:
            self._stop(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Where the step was an epoch's last, what belongs to its end is done first. The run's end is no stop."""
        if self.agreed and trainer.current_epoch + 1 < trainer.max_epochs:
            self._stop(trainer, module)

    def _stop(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.save(trainer, module)
        raise SIGTERMException
