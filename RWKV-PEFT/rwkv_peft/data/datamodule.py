"""Training batches for Lightning, by epoch, rank and batch.

B = micro_bsz, T = ctx_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxMeta, BinidxReader, check_tokenizer
from rwkv_peft.data.rows.mixture import open_source
from rwkv_peft.data.rows.sampling import DataPlan, Part, Source, make_plan
from rwkv_peft.data.validation_set import ValidationSet, open_validation
from rwkv_peft.data.windows import WindowLoader

SampleKey = tuple[int, int]
"""(epoch, index of the sample in it). Carrying the epoch in the key keeps it out of the data set's state."""


class BinidxDataModule(pl.LightningDataModule):
    """Training batches from binidx pairs: input_ids (B, T) int64, targets (B, T) int64, loss_mask (B, T) bool.

    Also sample (B, 2) int64, the epoch and the index in it of each row. With `pack` also starts (B, T) bool, where
    documents begin; with `only`, B is 1 and T as long as the document asks. How many tokens train comes with them
    (`WindowLoader`).

    At step s of an epoch, rank q of w gets the samples (s*w + q)*B .. +B-1: all ranks together get what one process
    with a batch of w*B gets. The trainer must run with `use_distributed_sampler=False`.

    Args:
        config: which data, in which order. Lightning's epoch e is epoch `config.epoch_begin + e` of the data.
        vocab_size: rows of the model's embedding; any id in the data must be below.
        tokenizer_identity: of the adapter that trains on, where it knows; the data must agree, where it knows.
    Raises (from `setup`):
        DataError: the pair is missing, damaged, of another tokenizer, or has ids beyond the vocabulary.
    """

    def __init__(
        self, config: DataConfig, vocab_size: int, tokenizer_identity: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._vocab_size = vocab_size
        self._expected_identity = tokenizer_identity
        self._samples: Source | None = None
        self._begin = (0, 0)
        self.validation: ValidationSet | None = None
        """What the run is measured on, where there is anything; there after `setup`."""

    def begin_at(self, epoch: int, batch: int) -> None:
        """Let the trainer's epoch 0 be epoch `epoch` of the run, from `batch` on; the trainer must then ask for a new
        loader in each epoch, since the first is shorter."""
        self._begin = (epoch, batch)

    @property
    def reader(self) -> BinidxReader:
        """The pair, the first of several; there after `setup`."""
        return self.parts[0].samples.reader

    @property
    def meta(self) -> BinidxMeta | None:
        """What the first pair that has a sidecar says; all agree on the tokenizer. There after `setup`."""
        return next((part.samples.reader.meta for part in self.parts if part.samples.reader.meta), None)

    def setup(self, stage: str | None = None) -> None:
        """Open and check the pairs, once."""
        if self._samples is not None:
            return
        source = open_source(self.config, self._vocab_size)
        for part in source.parts:
            check_tokenizer(part.samples.reader, self._expected_identity, "the adapter's")
        self.validation = open_validation(self.config, self._vocab_size, source.parts)
        for samples in self.validation.parts if self.validation else ():
            check_tokenizer(samples.reader, self._expected_identity, "the adapter's")
        self._samples = source

    @property
    def parts(self) -> tuple[Part, ...]:
        """The pairs that the run trains on; there after `setup`."""
        return self._ready().parts

    def plan(self, world_size: int) -> DataPlan:
        """Steps and passes of the run on `world_size` devices, after `setup`."""
        return make_plan(self._ready(), self.config, world_size)

    def train_dataloader(self) -> WindowLoader:
        """This rank's share of every epoch."""
        config, trainer = self.config, self.trainer
        first_epoch, first_batch = self._begin
        sampler = EpochSampler(
            steps=self.plan(trainer.world_size).steps_per_epoch,
            micro_bsz=config.micro_bsz,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            epoch_begin=config.epoch_begin + first_epoch,
            first_batch=first_batch if trainer.current_epoch == 0 else 0,
            goes_on=config.walks,
        )
        sampler.set_epoch(trainer.current_epoch)
        # No workers: a sample of mapped memory takes about 40 us, less than passing it between processes.
        dataset = SampleDataset(self._ready(), config.random_seed)
        # A loader draws a seed, which must not come out of the run's random numbers: it does so once an epoch.
        options = {"num_workers": 0, "generator": torch.Generator(), "window": trainer.accumulate_grad_batches}
        return WindowLoader(dataset, config.micro_bsz, sampler=sampler, **options)

    def first_samples(self, count: int) -> Iterator[dict[str, Tensor]]:
        """The run's first samples as batches of one, after `setup`: the same whatever the batch and the devices are."""
        dataset = SampleDataset(self._ready(), self.config.random_seed)
        for index in range(count):
            yield default_collate([dataset[self.config.epoch_begin, index]])

    def _ready(self) -> Source:
        if self._samples is None:
            raise RuntimeError("call setup() first")
        return self._samples


class SampleDataset(Dataset[dict[str, np.ndarray]]):
    """`Samples` under one seed, as torch wants it."""

    def __init__(self, samples: Source, seed: int) -> None:
        self._samples = samples
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> dict[str, np.ndarray]:
        epoch, index = key
        return {**self._samples.sample(self._seed, epoch, index), "sample": np.array(key)}


class EpochSampler(Sampler[SampleKey]):
    """The sample keys of one rank, in order.

    Lightning calls `set_epoch` on a loader's `sampler` before each epoch, and never on its `batch_sampler`, so this is
    the former. Keys are made lazily, since Lightning also makes the iterator of a resumed epoch before that call.

    Args:
        steps: batches of an epoch.
        epoch_begin: number of the trainer's epoch 0.
        first_batch: batches to leave out at the beginning of an epoch.
        goes_on: an epoch goes on where the one before stopped, as if all were epoch 0 (RWKV-LM's walk).
    """

    def __init__(
        self,
        *,
        steps: int,
        micro_bsz: int,
        world_size: int,
        rank: int,
        epoch_begin: int,
        first_batch: int = 0,
        goes_on: bool = False,
    ) -> None:
        self._steps = steps
        self._micro_bsz = micro_bsz
        self._world_size = world_size
        self._rank = rank
        self._epoch_begin = epoch_begin
        self._first_batch = first_batch
        self._goes_on = goes_on
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go on with the trainer's epoch `epoch`, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return (self._steps - self._first_batch) * self._micro_bsz

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, earlier_steps = self._epoch_begin + self._epoch, 0
        if self._goes_on:
            epoch, earlier_steps = 0, epoch * self._steps
        for step in range(earlier_steps + self._first_batch, earlier_steps + self._steps):
            first = (step * self._world_size + self._rank) * self._micro_bsz
            for i in range(self._micro_bsz):
                yield epoch, first + i
