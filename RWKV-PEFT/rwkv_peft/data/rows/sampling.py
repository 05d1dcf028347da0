"""Sample `index` of epoch `epoch`: a pure function of (seed, epoch, index).

Any process, worker or resumed run therefore gets the same samples. `pickers.py` says which tokens a row holds,
`masks.py` which of them train; here they become arrays.

T = ctx_len. A row is T + 1 tokens: T inputs and, one to the right, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.masks import TokenMask, make_mask
from rwkv_peft.data.rows.pickers import RowPicker, Span, make_picker
from rwkv_peft.errors import DataError

CHECK_ALL_UP_TO = 2**27
"""Streams of at most this many tokens are checked against the vocabulary on opening; 256 MB take 0.03 s."""

_CHECK_CHUNK = 2**22


class Samples:
    """Every training sample of a binidx pair.

    Args:
        reader: the pair.
        config: which rows, how long, and what trains in them. `data_file` is not read.
        vocab_size: any id must be below.
        source: number of the pair among several; each goes in an order of its own.
        picker: which rows, in place of --dataload's.
    Raises:
        DataError: no document (for `get` and `walk`: no stream) has two tokens, or a token id lies beyond the
            vocabulary. Ids are all checked here when there are at most `CHECK_ALL_UP_TO`, and those of a sample each
            time it is made. Or --loss_mask does not fit the pair.
        ConfigError: --magic_prime or --my_exit_tokens is another than the data's.
    """

    def __init__(
        self,
        reader: BinidxReader,
        config: DataConfig,
        vocab_size: int,
        source: int = 0,
        picker: RowPicker | None = None,
    ) -> None:
        self.reader = reader
        self.picker: RowPicker = picker or make_picker(reader, config, source)
        self._dataload, self._ctx_len = config.dataload, config.ctx_len
        self._vocab_size = vocab_size
        if self.picker.targets == 0:
            raise DataError(f"{reader.prefix}.bin", "nothing to predict", expected="a document of 2 tokens or more")
        if len(reader.tokens) <= CHECK_ALL_UP_TO:
            check_ids(reader, 0, len(reader.tokens), vocab_size)
        self.mask: TokenMask = make_mask(reader, config)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self, 1.0),)

    @property
    def samples_per_pass(self) -> int:
        return self.picker.samples_per_pass

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Sample `index` of `epoch`: the same for any number of processes, workers and resumes.

        Returns:
            input_ids (T,) int64, targets (T,) int64, loss_mask (T,) bool: True where the target trains. With `pack`
            also starts (T,) bool: True where the input is the first token of a document, or of the padding. With `only`
            T is as long as the document asks, at most ctx_len. A document of one token gives a row that trains nothing.
        """
        spans = self.picker.spans(seed, epoch, index)
        for start, stop in spans:
            check_ids(self.reader, start, stop, self._vocab_size)
        tokens = sum(stop - start for start, stop in spans)
        width = max(tokens, 2) if self._dataload == "only" else self._ctx_len + 1
        row, trains, starts = self._lay_out(spans, width)
        sample = {"input_ids": row[:-1], "targets": row[1:], "loss_mask": trains[1:]}
        if self._dataload == "pack":
            starts[tokens:][:1] = True  # the padding: nothing reads the state of the last document
            sample["starts"] = starts[:-1]
        return sample

    def _lay_out(self, spans: Sequence[Span], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (width,), where one trains as a target, where a span begins; all 0 behind the last span."""
        row = np.zeros(width, dtype=np.int64)
        trains = np.zeros(width, dtype=bool)
        starts = np.zeros(width, dtype=bool)
        place = 0
        for start, stop in spans:
            end = place + stop - start
            row[place:end] = self.reader.tokens[start:stop]
            trains[place + 1 : end] = self.mask.trains(start + 1, stop) if stop > start else False
            starts[place] = True
            place = end
        return row, trains, starts


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
class Part:
    """One pair of a run."""

    samples: Samples
    share: float
    """Of the run's rows, from 0 to 1."""


class Source(Protocol):
    """`Samples`, or several mixed."""

    samples_per_pass: int
    parts: tuple[Part, ...]

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]: ...


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
    """Documents whose end is cut off (`--long truncate`)."""
    padding: float
    """Share of the target places that are padding, from 0 to 1."""
    targets: int
    """Tokens that a pass predicts, before any --loss_mask; of several pairs, each gone through once."""
    masks: tuple[str, ...]
    """The --loss_mask of each pair."""
    silent: int
    """Documents that train nothing, because their markers are missing or their mask is all zero."""
    wraps: bool
    """Whether an epoch asks for more rows than there are, beyond filling up its last batch."""


def make_plan(source: Source, config: DataConfig, world_size: int) -> DataPlan:
    """Steps and passes of a run on `world_size` devices; epoch_steps 0 means one pass, its last batch filled up."""
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
        silent=sum(part.samples.mask.silent for part in parts),
        wraps=steps > one_pass,
    )
