"""Training batches for Lightning. One batch is one optimizer step: a list of micro-batches.

B = micro_bsz, T = ctx_len.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from rwkv_peft.data.training_data import TrainingData

SampleKey = tuple[int, int]
"""Epoch, and index of a row in it."""
StepKeys = list[list[SampleKey]]
"""The rows of one optimizer step: B keys for each micro-batch."""
MicroBatch = dict[str, Tensor]


class BinidxDataModule(pl.LightningDataModule):
    """Training batches from binidx pairs.

    A batch is a list of `micro_batches_per_step` micro-batches; the last list of an epoch may be shorter. A
    micro-batch is a dict of

        input_ids  (B, T) int64
        targets    (B, T) int64
        loss_mask  (B, T) bool, True if predicting the target is trained
        sample     (B, 2) int64, epoch and index of each row
        starts     (B, T) bool, True at the first token of a document; only with `--dataload pack`

    With `--dataload only`, B is 1 and T is the length of the document, at most ctx_len.

    Micro-batch s of an epoch on rank q of w holds rows (s*w + q)*B to (s*w + q)*B + B-1. So all ranks together get the
    rows that one process gets with micro-batches of w*B rows. The trainer must have `use_distributed_sampler=False`.

    Args:
        data: the run's data. Lightning's epoch e is epoch `epoch_begin + e` of the data.
        micro_batches_per_step: micro-batches of one optimizer step (`--accumulate_grad_batches`).
    """

    def __init__(self, data: TrainingData, micro_batches_per_step: int) -> None:
        super().__init__()
        self.data = data
        self._per_step = micro_batches_per_step
        self._begin = (0, 0)

    def begin_at(self, epoch: int, micro_batch: int) -> None:
        """Start the run in epoch `epoch`, at micro-batch `micro_batch` of it.

        The trainer's epoch 0 is then that epoch. It is shorter than the others, so the trainer must ask for a new
        loader in each epoch (`reload_dataloaders_every_n_epochs=1`).
        """
        self._begin = (epoch, micro_batch)

    def train_dataloader(self) -> DataLoader[list[MicroBatch]]:
        """Return this rank's batches of the trainer's current epoch."""
        config, trainer = self.data.config, self.trainer
        first_epoch, first_micro_batch = self._begin
        sampler = StepSampler(
            micro_batches=self.data.plan(trainer.world_size).steps_per_epoch,
            per_step=self._per_step,
            micro_bsz=config.micro_bsz,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            epoch_begin=config.epoch_begin + first_epoch,
            first_micro_batch=first_micro_batch if trainer.current_epoch == 0 else 0,
            continuous=config.walks,
        )
        sampler.set_epoch(trainer.current_epoch)
        # No workers: reading a row takes about 40 us, less than sending it between processes.
        # A loader draws a seed in each epoch, which must not come from the run's random numbers.
        options = {"batch_size": None, "num_workers": 0, "generator": torch.Generator()}
        return DataLoader(StepDataset(self.data), sampler=sampler, collate_fn=_unchanged, **options)


def _unchanged(batch: list[MicroBatch]) -> list[MicroBatch]:
    return batch


class StepDataset(Dataset[list[MicroBatch]]):
    """A run's optimizer steps by their `StepKeys`."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __getitem__(self, keys: StepKeys) -> list[MicroBatch]:
        return [default_collate([self._row(*key) for key in micro_batch]) for micro_batch in keys]

    def _row(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        return {**self._data.sample(epoch, index), "sample": np.array((epoch, index))}


class StepSampler(Sampler[StepKeys]):
    """The optimizer steps of one rank, in order.

    Lightning calls `set_epoch` before each epoch. For a resumed epoch it makes the iterator before that call, so the
    iterator computes the keys only when they are needed.

    Args:
        micro_batches: micro-batches of an epoch on each rank.
        per_step: micro-batches of one optimizer step.
        micro_bsz: rows of a micro-batch.
        world_size, rank: number of processes, and the number of this one.
        epoch_begin: the data's epoch in the trainer's epoch 0.
        first_micro_batch: micro-batches to skip at the beginning of an epoch.
        continuous: an epoch continues where the previous one ended, as if all were epoch 0 (RWKV-LM's walk).
    """

    def __init__(
        self,
        *,
        micro_batches: int,
        per_step: int,
        micro_bsz: int,
        world_size: int,
        rank: int,
        epoch_begin: int,
        first_micro_batch: int = 0,
        continuous: bool = False,
    ) -> None:
        self._micro_batches, self._first = micro_batches, first_micro_batch
        self._per_step, self._micro_bsz = per_step, micro_bsz
        self._world_size, self._rank = world_size, rank
        self._epoch_begin, self._continuous = epoch_begin, continuous
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the trainer's epoch, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of optimizer steps that are left in the epoch."""
        return -(-(self._micro_batches - self._first) // self._per_step)

    def __iter__(self) -> Iterator[StepKeys]:
        for first in range(self._first, self._micro_batches, self._per_step):
            numbers = range(first, min(first + self._per_step, self._micro_batches))
            yield [self._micro_batch(number) for number in numbers]

    def _micro_batch(self, number: int) -> list[SampleKey]:
        epoch = self._epoch_begin + self._epoch
        if self._continuous:
            epoch, number = 0, epoch * self._micro_batches + number
        first = (number * self._world_size + self._rank) * self._micro_bsz
        return [(epoch, first + i) for i in range(self._micro_bsz)]
