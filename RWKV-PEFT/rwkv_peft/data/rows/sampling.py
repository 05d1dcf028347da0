"""Makes training rows as a pure function of (seed, epoch, index).

So every process and every resumed run gets the same rows. row_types.py decides which tokens a row has, masks.py decides
which of them are in the loss, and this file makes arrays of them.

T = ctx_len. A row has T + 1 tokens: T inputs and T targets, which are the inputs shifted by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.masks import TokenMask, make_mask
from rwkv_peft.data.rows.row_types import RowPicker, Span, make_picker
from rwkv_peft.errors import DataError

CHECK_ALL_UP_TO = 2**27
"""Pairs of at most this many tokens are checked against the vocabulary when they are opened; 256 MB take 0.03 s."""

_CHECK_CHUNK = 2**22


class Samples:
    """The training rows of a binidx pair.

    Args:
        reader: the pair.
        config: how rows are made and which tokens are in the loss. Its `data_file` is not used.
        vocab_size: all token ids must be smaller.
        stream: number of the pair in the run, so that each pair has its own random order.
        picker: replaces the row picker of --dataload.
    Raises:
        DataError: no document (with `get` and `walk`: not the whole pair) has two tokens, a token id is outside the
            vocabulary, or --loss_mask does not fit the pair. Ids of pairs longer than `CHECK_ALL_UP_TO` tokens are
            only checked when their rows are made.
        ConfigError: --magic_prime or --my_exit_tokens does not fit the data.
    """

    def __init__(
        self,
        reader: BinidxReader,
        config: DataConfig,
        vocab_size: int,
        stream: int = 0,
        picker: RowPicker | None = None,
    ) -> None:
        self.reader = reader
        self.picker: RowPicker = picker or make_picker(reader, config, stream)
        self._dataload, self._ctx_len = config.dataload, config.ctx_len
        self._vocab_size = vocab_size
        if self.picker.targets == 0:
            raise DataError(
                f"{reader.prefix}.bin", "there is nothing to predict", expected="a document of at least 2 tokens"
            )
        if len(reader.tokens) <= CHECK_ALL_UP_TO:
            check_ids(reader, 0, len(reader.tokens), vocab_size)
        self.mask: TokenMask = make_mask(reader, config)

    @property
    def parts(self) -> tuple[Part, ...]:
        """This pair, as the only one."""
        return (Part(self, 1.0),)

    @property
    def samples_per_pass(self) -> int:
        """Rows of one pass over the data."""
        return self.picker.samples_per_pass

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Return row `index` of `epoch`.

        Returns:
            input_ids: (T,) int64.
            targets: (T,) int64.
            loss_mask: (T,) bool, True if the target is trained.
            starts: (T,) bool, True at the first token of a document and of the padding; only with `pack`.

            With `only`, T is the length of the document, at most ctx_len. A document of one token gives a row without
            a trained target.
        """
        spans = self.picker.spans(seed, epoch, index)
        for start, stop in spans:
            check_ids(self.reader, start, stop, self._vocab_size)
        tokens = sum(stop - start for start, stop in spans)
        width = max(tokens, 2) if self._dataload == "only" else self._ctx_len + 1
        row, trained, starts = self._fill_row(spans, width)
        sample = {"input_ids": row[:-1], "targets": row[1:], "loss_mask": trained[1:]}
        if self._dataload == "pack":
            starts[tokens:][:1] = True  # the padding does not continue the last document
            sample["starts"] = starts[:-1]
        return sample

    def _fill_row(self, spans: Sequence[Span], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, whether they are trained as targets, and whether they begin a span; each (width,).

        All are 0 after the last span.
        """
        row = np.zeros(width, dtype=np.int64)
        trained = np.zeros(width, dtype=bool)
        starts = np.zeros(width, dtype=bool)
        begin = 0
        for start, stop in spans:
            end = begin + stop - start
            row[begin:end] = self.reader.tokens[start:stop]
            trained[begin + 1 : end] = self.mask.trained(start + 1, stop) if stop > start else False
            starts[begin] = True
            begin = end
        return row, trained, starts


def check_ids(reader: BinidxReader, start: int, stop: int, vocab_size: int) -> None:
    """Raise DataError for the first of the tokens start..stop that is outside the vocabulary."""
    limits = np.iinfo(reader.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    for first in range(start, stop, _CHECK_CHUNK):
        ids = reader.tokens[first : min(first + _CHECK_CHUNK, stop)]
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise _outside_vocabulary(reader, first + int(np.argmax((ids < 0) | (ids >= vocab_size))), vocab_size)


def _outside_vocabulary(reader: BinidxReader, token: int, vocab_size: int) -> DataError:
    document = int(np.searchsorted(reader.bounds, token, side="right")) - 1
    position = token - int(reader.bounds[document])
    return DataError(
        f"{reader.prefix}.bin",
        "a token id is outside the vocabulary",
        found=f"{reader.tokens[token]} at token {position} of document {document}",
        expected=f"0 to {vocab_size - 1} (vocab_size {vocab_size})",
        hint="Convert the text with the model's own tokenizer (rwkv-peft convert --tokenizer).",
    )


@dataclass(frozen=True)
class Part:
    """A training pair of a run."""

    samples: Samples
    share: float
    """Its fraction of the run's rows, from 0 to 1."""


class RowSource(Protocol):
    """Training rows: `Samples`, or `MixedSamples` of several pairs."""

    samples_per_pass: int
    parts: tuple[Part, ...]

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class DataPlan:
    """What a run reads, for the summary at the start."""

    documents: int
    tokens: int
    samples_per_pass: int
    """Rows of one pass over the data."""
    steps_per_epoch: int
    """Micro-batches of one epoch on each device; all devices together read world_size * micro_bsz rows at a time."""
    passes: float
    """Passes over the data in all epochs together."""
    truncated: int
    """Documents whose end is cut off (`--long truncate`)."""
    padding: float
    """Fraction of the targets that is padding, from 0 to 1."""
    targets: int
    """Targets of one pass over each pair, before any --loss_mask."""
    masks: tuple[str, ...]
    """The --loss_mask of each pair."""
    untrained_documents: int
    """Documents without a token in the loss: they have no markers, or their mask is all zero."""
    wraps: bool
    """Whether an epoch needs more rows than a pass has, apart from filling its last batch."""


def make_plan(source: RowSource, config: DataConfig, world_size: int) -> DataPlan:
    """Return steps and passes of a run on `world_size` devices.

    With epoch_steps 0, an epoch is one pass; rows of the next pass fill its last batch.
    """
    parts = source.parts
    batch = config.micro_bsz * world_size
    one_pass = -(-source.samples_per_pass // batch)
    steps = config.epoch_steps or one_pass
    return DataPlan(
        documents=sum(len(part.samples.reader) for part in parts),
        tokens=sum(len(part.samples.reader.tokens) for part in parts),
        samples_per_pass=source.samples_per_pass,
        steps_per_epoch=steps,
        passes=config.epoch_count * steps * batch / source.samples_per_pass,
        truncated=sum(part.samples.picker.truncated for part in parts),
        padding=sum(part.share * part.samples.picker.padding for part in parts),
        targets=sum(part.samples.picker.targets for part in parts),
        masks=tuple(part.samples.mask.name for part in parts),
        untrained_documents=sum(part.samples.mask.untrained_documents for part in parts),
        wraps=steps > one_pass,
    )
