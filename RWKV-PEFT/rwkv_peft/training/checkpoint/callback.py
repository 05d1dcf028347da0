"""When a run saves a checkpoint, what goes into it, and how it comes back. Nothing of it is done by Lightning.

All processes gather what they hold of the state at the end of an optimizer step; the first one then writes it in the
background, from copies in its memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from rwkv_peft.errors import CheckpointError
from rwkv_peft.peft.injection import initial_factors
from rwkv_peft.training.checkpoint.file import Checkpoint, checkpoint_path, prune, write_checkpoint
from rwkv_peft.training.checkpoint.optimizer_state import MASTER, collect, put_back
from rwkv_peft.training.checkpoint.resume import Position, position_of
from rwkv_peft.training.checkpoint.rng import random_state, set_random_state
from rwkv_peft.training.metrics.recorder import StepCallback
from rwkv_peft.training.module import TrainingModule


@dataclass(frozen=True)
class Due:
    """When checkpoints are saved beside the ends of epochs, and how many stay."""

    steps: int
    """Every so many optimizer steps; 0: not by steps."""
    minutes: float
    """After so many minutes; 0: not by time."""
    keep: int
    patience: int = 0
    """Validations after which a run that got no better ends; a checkpoint says if it did."""


class Checkpointer(StepCallback):
    """Saves checkpoints, and puts the one that the run goes on from back, at its first step.

    Args:
        folder: of the checkpoints.
        model: prepared, its trained parameters marked.
        manifest: what a checkpoint says of the run, beside where it is.
        due: when to save.
        earlier: the checkpoint to go on from.
    """

    def __init__(
        self, folder: Path, model: nn.Module, manifest: Mapping[str, Any], due: Due, earlier: Checkpoint | None
    ) -> None:
        super().__init__()
        self.folder, self.due, self.earlier = folder, due, earlier
        self._manifest = manifest
        # By the names of now: LISA freezes and thaws while it trains.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._factors = initial_factors(model)
        self._begin = position_of(earlier)
        self._saved_step = self._begin.step
        self._saved_time = time.monotonic()
        self._writer = Writer(folder, due.keep, self._begin.step)

    # ------------------------------------------------------------------------------------- going on

    def restore(self, callbacks: Sequence[pl.Callback]) -> None:
        """Give callbacks the state that they had; before training begins, at which some act by it."""
        states = self.earlier.manifest["callbacks"] if self.earlier else {}
        for callback in callbacks:
            if type(callback).__name__ in states:
                callback.load_state_dict(states[type(callback).__name__])

    def on_fit_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Before any process waits for others that do something else."""
        own = [self._begin.step, self._manifest["inputs"]]
        first = trainer.strategy.broadcast(own)
        if first[0] != own[0]:  # another machine, which does not see the folder
            what = f"process {trainer.global_rank} is after step {own[0]}, the first one after {first[0]}"
            raise CheckpointError("--resume", what, hint="All machines must see one --proj_dir.")
        if first[1] != own[1]:
            what = f"process {trainer.global_rank} has another base or other data than the first one"
            raise CheckpointError("--data_file", what, hint="All must see the same files, unchanged while they start.")

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if self.earlier is None:
            return
        if module.draw is not None:  # before the moments are there, which a draw drops
            module.draw.apply(module.model.blocks, trainer.optimizers[0], max(self._begin.step - 1, 0))
        module.guard.load_state_dict(self.earlier.manifest["guard"])
        trainer.precision_plugin.load_state_dict(self.earlier.manifest["precision"])
        put_back(self._parameters, trainer.optimizers[0], self.earlier.tensors, self.earlier.manifest["scalars"])
        self.earlier.tensors.clear()

    def on_train_batch_start(self, trainer: pl.Trainer, module: TrainingModule, batch, batch_idx: int) -> None:
        """Random states come last: whatever else a start draws must not matter."""
        if self.earlier is None:
            return
        states = self.earlier.manifest["random"]
        same = len(states) == trainer.world_size
        set_random_state(states[trainer.global_rank if same else 0], module.device)
        self.earlier = None

    # --------------------------------------------------------------------------------------- saving

    def after_step(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        # The end of an epoch saves what it trained first, so that a run which goes on from there has it.
        if not trainer.is_last_batch and self._is_due(trainer, module):
            self.save(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if not trainer.is_last_batch:  # a validation ended the run early
            self.save(trainer, module)
            return
        self._save(trainer, module, Position(module.step, self._begin.epoch + trainer.current_epoch + 1, 0))

    def save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Save the state after the step just made, on all processes, within an epoch."""
        earlier_batches = self._begin.batch if trainer.current_epoch == 0 else 0
        batch = earlier_batches + trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self._save(trainer, module, Position(module.step, self._begin.epoch + trainer.current_epoch, batch))

    def close(self, *, must: bool = True) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: the last checkpoint could not be written, where it `must` be.
        """
        error = self._writer.close()
        if error is not None and must:
            raise error

    def _is_due(self, trainer: pl.Trainer, module: TrainingModule) -> bool:
        by_steps = self.due.steps > 0 and module.step % self.due.steps == 0
        if by_steps or not self.due.minutes:
            return by_steps
        late = time.monotonic() - self._saved_time >= 60 * self.due.minutes
        return bool(trainer.strategy.reduce(torch.tensor(int(late), device=module.device), reduce_op="max"))

    def _save(self, trainer: pl.Trainer, module: TrainingModule, position: Position) -> None:
        if module.step == self._saved_step:
            return
        is_first = trainer.is_global_zero
        self._writer.wait()
        tensors, scalars = collect(self._parameters, trainer.optimizers[0], keep=is_first)
        states = _of_all_processes(random_state(module.device), trainer)
        if is_first:
            for name, factor in self._factors.items():
                tensors[f"{MASTER}/{name}"] = factor.detach().to("cpu", copy=True)
            manifest = {
                **self._manifest,
                "position": asdict(position),
                "total_steps": module.total_steps,
                "ended_by_patience": self.due.patience if trainer.should_stop else 0,
                "scalars": scalars,
                "random": states,
                "guard": module.guard.state_dict(),
                "precision": trainer.precision_plugin.state_dict(),
                "callbacks": {type(c).__name__: state for c in trainer.callbacks if (state := c.state_dict())},
            }
            self._writer.start(position.step, tensors, manifest)
        self._saved_step, self._saved_time = module.step, time.monotonic()


def _of_all_processes(value: Any, trainer: pl.Trainer) -> list[Any]:
    """Every process's value on the first; [] or one's own elsewhere."""
    if trainer.world_size == 1:
        return [value]
    values = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


class Writer:
    """Writes one checkpoint at a time in a thread of its own."""

    def __init__(self, folder: Path, keep: int, last_good: int) -> None:
        self._folder, self._keep, self._last_good = folder, keep, last_good
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[CheckpointError | None] | None = None

    def start(self, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
        """Write these, which must not change meanwhile; call `wait` first."""
        self._pending = self._pool.submit(self._write, step, tensors, manifest)

    def wait(self) -> CheckpointError | None:
        """Wait for the last one; why it could not be written, if so."""
        return self._pending.result() if self._pending else None

    def close(self) -> CheckpointError | None:
        """`wait`, and no more are to come."""
        error = self.wait()
        self._pool.shutdown()
        return error

    def _write(self, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> CheckpointError | None:
        try:
            write_checkpoint(checkpoint_path(self._folder, step), tensors, manifest)
        except CheckpointError as error:
            last = f"the last checkpoint is of step {self._last_good}" if self._last_good else "there is none yet"
            sys.stderr.write(f"warning: {error} Training goes on; {last}.\n")
            return error
        self._last_good = step
        prune(self._folder, step, self._keep)
        return None
