"""Which tokens make sample `index` of epoch `epoch`: a pure function of (seed, epoch, index).

Random numbers come from Philox, which is counter-based: the number of (seed, epoch, index) is computed, not reached
by drawing the ones before it. Any process, worker or resumed run therefore gets the same samples. Only raw 64-bit
output is used, because numpy promises to keep that for ever, and `Generator.permutation` not.

T = ctx_len. A row is T + 1 consecutive tokens: T inputs and, one to the right, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from rwkv_peft.config import DataConfig
from rwkv_peft.data.binidx import BinidxReader
from rwkv_peft.data.masks import MASKS, Mask
from rwkv_peft.errors import DataError

CHECK_ALL_UP_TO = 2**27
"""Streams of at most this many tokens are checked against the vocabulary on opening; 256 MB take 0.03 s."""

_CHECK_CHUNK = 2**22


class RowPicker(Protocol):
    """One `--dataload`: where in the token stream each row lies."""

    samples_per_pass: int
    """Rows that make one pass over the data."""
    truncated: int
    """Documents longer than a row, whose end is never seen."""
    padding: float
    """Share of the target places of a pass that are padding."""

    def span(self, seed: int, epoch: int, index: int) -> tuple[int, int]:
        """First and one past the last token of the row; at most T + 1 apart."""


class RandomWindows:
    """`--dataload get`: windows at uniformly random places of the whole stream, across document ends.

    A stream of at most T tokens has one window: all of it, padded.
    """

    truncated = 0

    def __init__(self, reader: BinidxReader, ctx_len: int) -> None:
        self._tokens = len(reader.tokens)
        self._ctx_len = ctx_len
        self._starts = max(self._tokens - ctx_len, 1)
        targets = max(self._tokens - 1, 1)
        self.samples_per_pass = -(-targets // ctx_len)
        self.padding = max(0.0, 1 - (self._tokens - 1) / ctx_len)

    def span(self, seed: int, epoch: int, index: int) -> tuple[int, int]:
        draw = int(_philox(seed, epoch, index).random_raw())
        start = draw * self._starts >> 64  # uniform in [0, starts), with a bias below starts / 2**64
        return start, min(start + self._ctx_len + 1, self._tokens)


class PaddedDocuments:
    """`--dataload pad`: one document a row, in a new order each epoch.

    Documents longer than T + 1 tokens are cut there, shorter ones padded. An epoch of more samples than documents goes
    on with another order, so that every document is seen once before any is seen twice.
    """

    def __init__(self, reader: BinidxReader, ctx_len: int) -> None:
        self._bounds = reader.bounds
        self._ctx_len = ctx_len
        self.samples_per_pass = len(reader)
        self.truncated = int((reader.sizes > ctx_len + 1).sum())
        targets = np.clip(reader.sizes - 1, 0, ctx_len).sum()
        self.padding = 1 - float(targets) / (len(reader) * ctx_len)

    def span(self, seed: int, epoch: int, index: int) -> tuple[int, int]:
        round_number, place = divmod(index, self.samples_per_pass)
        document = _permutation(seed, epoch, round_number, self.samples_per_pass)[place]
        start, stop = int(self._bounds[document]), int(self._bounds[document + 1])
        return start, min(stop, start + self._ctx_len + 1)


PICKERS = {"get": RandomWindows, "pad": PaddedDocuments}


class Samples:
    """Every training sample of a binidx pair.

    Raises:
        DataError: no document (for `get`: no stream) has two tokens, or a token id lies beyond the vocabulary. Ids are
            all checked here when there are at most `CHECK_ALL_UP_TO`, and those of a sample each time it is made.
    """

    def __init__(self, reader: BinidxReader, config: DataConfig, vocab_size: int) -> None:
        self.reader = reader
        self._ctx_len = config.ctx_len
        self._vocab_size = vocab_size
        self._picker: RowPicker = PICKERS[config.dataload](reader, config.ctx_len)
        self._mask: Mask = MASKS[config.loss_mask]
        if self._picker.padding == 1:
            raise DataError(f"{reader.prefix}.bin", "nothing to predict", expected="a document of 2 tokens or more")
        if len(reader.tokens) <= CHECK_ALL_UP_TO:
            check_ids(reader, 0, len(reader.tokens), vocab_size)

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of `epoch`: the same for any number of processes, workers and resumes.

        Returns:
            input_ids (T,) int64, targets (T,) int64, loss_mask (T,) bool: True where the target trains. A document of
            one token gives a row that trains nothing.
        """
        start, stop = self._picker.span(seed, epoch, index)
        check_ids(self.reader, start, stop, self._vocab_size)
        tokens = self.reader.tokens[start:stop]  # (N,), N <= T + 1
        row = np.zeros(self._ctx_len + 1, dtype=np.int64)
        row[: len(tokens)] = tokens
        return {"input_ids": row[:-1], "targets": row[1:], "loss_mask": self._mask(tokens, self._ctx_len)}


def check_ids(reader: BinidxReader, start: int, stop: int, vocab_size: int) -> None:
    """Raise DataError for the first of the tokens start..stop that is not an id of the vocabulary."""
    limits = np.iinfo(reader.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    for first in range(start, stop, _CHECK_CHUNK):
        ids = reader.tokens[first : min(first + _CHECK_CHUNK, stop)]
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = first + int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise _beyond_vocabulary(reader, place, vocab_size)


def _beyond_vocabulary(reader: BinidxReader, place: int, vocab_size: int) -> DataError:
    document = int(np.searchsorted(reader.bounds, place, side="right")) - 1
    position = place - int(reader.bounds[document])
    return DataError(
        f"{reader.prefix}.bin",
        "a token id beyond the vocabulary",
        found=f"{reader.tokens[place]} at token {position} of document {document}",
        expected=f"0 to {vocab_size - 1} (vocab_size {vocab_size})",
        hint="Convert the text with the model's own tokenizer (tools/json2binidx.py --tokenizer).",
    )


@dataclass(frozen=True)
class DataPlan:
    """What a run will read, for the banner."""

    documents: int
    tokens: int
    samples_per_pass: int
    """Rows of one pass over the data."""
    steps_per_epoch: int
    """Batches of one epoch; a batch is world_size * micro_bsz rows."""
    passes: float
    """How often all epochs together go over the data."""
    truncated: int
    """Documents whose end is cut off (`pad`)."""
    padding: float
    """Share of the target places that are padding, from 0 to 1."""


def make_plan(reader: BinidxReader, config: DataConfig, world_size: int) -> DataPlan:
    """Steps and passes of a run on `world_size` devices; epoch_steps 0 means one pass, its last batch filled up."""
    picker: RowPicker = PICKERS[config.dataload](reader, config.ctx_len)
    batch = config.micro_bsz * world_size
    steps = config.epoch_steps or -(-picker.samples_per_pass // batch)
    return DataPlan(
        documents=len(reader),
        tokens=len(reader.tokens),
        samples_per_pass=picker.samples_per_pass,
        steps_per_epoch=steps,
        passes=config.epoch_count * steps * batch / picker.samples_per_pass,
        truncated=picker.truncated,
        padding=picker.padding,
    )


def _philox(seed: int, epoch: int, number: int) -> np.random.Philox:
    """A random stream of its own for each (seed, epoch, number)."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, number, 0, 0], dtype=np.uint64))


@lru_cache(maxsize=2)  # two: a batch may lie across the end of a round
def _permutation(seed: int, epoch: int, round_number: int, length: int) -> np.ndarray:
    """An order of 0..length-1, (length,) int64: that of as many random numbers."""
    order = _philox(seed, epoch, round_number).random_raw(length).argsort(kind="stable")
    order.flags.writeable = False
    return order
