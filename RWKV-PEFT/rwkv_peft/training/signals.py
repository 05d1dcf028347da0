"""Stopping a run on Ctrl-C or SIGTERM, after all processes have finished the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException


class StopSignals:
    """Remembers SIGTERM and Ctrl-C until the end of the current step. A second Ctrl-C interrupts immediately.

    Lightning alone would stop a process in the middle of a step, while other processes wait for it in a collective.
    After Ctrl-C it would kill the other processes, together with the shards that they hold under ZeRO.
    """

    def __init__(self) -> None:
        self.agreed = 0
        """Number of the signal on which all processes stop; 0 if there was none."""
        self._received = 0

    def install(self) -> None:
        """Replace Lightning's signal handlers; Lightning restores the original ones at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def agree(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Return whether any process has received a signal; the same on all processes."""
        received = torch.tensor(self._received, device=module.device)
        self.agreed = int(trainer.strategy.reduce(received, reduce_op="max"))
        return bool(self.agreed)

    def stop(self) -> NoReturn:
        """End training the way Lightning does on SIGTERM."""
        raise SIGTERMException
