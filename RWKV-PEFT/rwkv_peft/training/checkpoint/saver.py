"""Saves checkpoints while a run trains, and restores the one it resumes from.

At the end of an optimizer step, all processes gather their parts of the state on process 0. Process 0 then writes the
checkpoint in the background, from copies in its memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from rwkv_peft.console import warn
from rwkv_peft.errors import CheckpointError
from rwkv_peft.peft.injection import initial_factors
from rwkv_peft.training.checkpoint.file import Checkpoint, checkpoint_path, prune, write_checkpoint
from rwkv_peft.training.checkpoint.optimizer_state import MODEL, gather_state, restore_state
from rwkv_peft.training.checkpoint.resume import Position, position_of
from rwkv_peft.training.checkpoint.rng import random_state, set_random_state
from rwkv_peft.training.step import TrainingModule


@dataclass(frozen=True)
class SavePlan:
    """When checkpoints are saved, apart from those at epoch ends, and how many are kept."""

    steps: int
    """Save every N optimizer steps; 0: not by steps."""
    minutes: float
    """Save every N minutes; 0: not by time."""
    keep: int
    patience: int = 0
    """The run's `--patience`. If it ended the run, checkpoints say so."""


class Stateful(Protocol):
    """A part of a run whose state is kept in checkpoints as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointSaver:
    """Saves checkpoints into a folder.

    Args:
        folder: for the checkpoints.
        model: prepared, with trainable parameters marked.
        manifest: what a checkpoint says about the run, apart from its position.
        plan: when to save.
        parts: other state to keep, by its key in the manifest.
        earlier: the checkpoint to resume from.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        manifest: Mapping[str, Any],
        plan: SavePlan,
        parts: Mapping[str, Stateful],
        earlier: Checkpoint | None,
    ) -> None:
        self.folder, self.plan = folder, plan
        self._manifest, self._parts, self._earlier = manifest, parts, earlier
        # The names are fixed here, because LISA freezes and unfreezes parameters during training.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._factors = initial_factors(model)
        self._begin = position_of(earlier)
        self._batches = self._begin.batch
        self._saved_step = self._begin.step
        self._saved_time = time.monotonic()
        self._writer = Writer(folder, plan.keep, self._begin.step)
        for key, part in parts.items():
            if earlier and key in earlier.manifest["parts"]:
                part.load_state_dict(earlier.manifest["parts"][key])

    # ------------------------------------------------------------------------------------- resuming

    def check_processes_agree(self, trainer: pl.Trainer) -> None:
        """Check that all processes resume from the same step with the same inputs, before a collective call can hang.

        Raises:
            CheckpointError: a machine sees another run folder, base or data than process 0.
        """
        own = [self._begin.step, self._manifest["inputs"]]
        first = trainer.strategy.broadcast(own)
        if first[0] != own[0]:
            what = f"process {trainer.global_rank} would resume after step {own[0]}, process 0 after {first[0]}"
            raise CheckpointError("--resume", what, hint="All machines must see the same --proj_dir.")
        if first[1] != own[1]:
            what = f"process {trainer.global_rank} has another base or other data than process 0"
            hint = "All machines must see the same files, and nothing may change them during start-up."
            raise CheckpointError("--data_file", what, hint=hint)

    def restore(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Restore everything but the random generators into the prepared run."""
        if self._earlier is None:
            return
        manifest, optimizer = self._earlier.manifest, trainer.optimizers[0]
        if module.block_freezer is not None:  # before the moments are restored, because freezing drops some
            module.block_freezer.apply(module.model.blocks, optimizer, max(self._begin.step - 1, 0))
        module.guard.load_state_dict(manifest["guard"])
        trainer.precision_plugin.load_state_dict(manifest["precision"])
        restore_state(self._parameters, optimizer, self._earlier.tensors, manifest["scalars"])
        self._earlier.tensors.clear()

    def restore_random_state(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Restore the random generators, once; call this directly before the first step."""
        if self._earlier is None:
            return
        states = self._earlier.manifest["random"]
        same_world = len(states) == trainer.world_size
        set_random_state(states[trainer.global_rank if same_world else 0], module.device)
        self._earlier = None

    # --------------------------------------------------------------------------------------- saving

    def count_batches(self, count: int) -> None:
        """Count micro-batches of the epoch in progress, of this process."""
        self._batches += count

    def is_due(self, trainer: pl.Trainer, module: TrainingModule) -> bool:
        """Return whether the plan asks for a checkpoint after this step; the same on all processes."""
        by_steps = self.plan.steps > 0 and module.step % self.plan.steps == 0
        if by_steps or not self.plan.minutes:
            return by_steps
        late = time.monotonic() - self._saved_time >= 60 * self.plan.minutes
        return bool(trainer.strategy.reduce(torch.tensor(int(late), device=module.device), reduce_op="max"))

    def save(self, trainer: pl.Trainer, module: TrainingModule, *, epoch_ended: bool = False) -> None:
        """Save the state after the last step, unless that has been saved already. All processes call this together."""
        epoch = self._begin.epoch + trainer.current_epoch
        position = Position(module.step, epoch + 1, 0) if epoch_ended else Position(module.step, epoch, self._batches)
        if epoch_ended:
            self._batches = 0
        if module.step == self._saved_step:
            return
        self._writer.wait()
        tensors, scalars = gather_state(self._parameters, trainer.optimizers[0], keep=trainer.is_global_zero)
        states = _gather_objects(random_state(module.device), trainer)
        if trainer.is_global_zero:
            for name, factor in self._factors.items():
                tensors[f"{MODEL}/{name}"] = factor.detach().to("cpu", copy=True)
            manifest = {
                **self._manifest,
                "position": asdict(position),
                "total_steps": module.total_steps,
                "ended_by_patience": self.plan.patience if trainer.should_stop else 0,
                "scalars": scalars,
                "random": states,
                "guard": module.guard.state_dict(),
                "precision": trainer.precision_plugin.state_dict(),
                "parts": {key: part.state_dict() for key, part in self._parts.items()},
            }
            self._writer.start(position.step, tensors, manifest)
        self._saved_step, self._saved_time = module.step, time.monotonic()

    def close(self, *, must_succeed: bool = True) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError: it could not be written although it `must_succeed`.
        """
        error = self._writer.close()
        if error is not None and must_succeed:
            raise error


def _gather_objects(value: Any, trainer: pl.Trainer) -> list[Any]:
    """Return every process's value on process 0, and [] on others."""
    if trainer.world_size == 1:
        return [value]
    values = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


class Writer:
    """Writes one checkpoint at a time in a background thread."""

    def __init__(self, folder: Path, keep: int, last_good: int) -> None:
        self._folder, self._keep, self._last_good = folder, keep, last_good
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[CheckpointError | None] | None = None

    def start(self, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
        """Start writing a checkpoint. Call `wait` first; the tensors must not change until it is written."""
        self._pending = self._pool.submit(self._write, step, tensors, manifest)

    def wait(self) -> CheckpointError | None:
        """Wait for the checkpoint in progress and return the error if it could not be written."""
        return self._pending.result() if self._pending else None

    def close(self) -> CheckpointError | None:
        """`wait`, and end the thread."""
        error = self.wait()
        self._pool.shutdown()
        return error

    def _write(self, step: int, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> CheckpointError | None:
        try:
            write_checkpoint(checkpoint_path(self._folder, step), tensors, manifest)
        except CheckpointError as error:
            last = f"the last checkpoint is of step {self._last_good}" if self._last_good else "there is none yet"
            warn(f"{error} Training continues; {last}.")
            return error
        self._last_good = step
        prune(self._folder, step, self._keep)
        return None
