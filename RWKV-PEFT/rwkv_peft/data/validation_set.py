"""What a run is measured on: every row of some pairs, each once, in a fixed order.

B = micro_bsz, T = ctx_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.identity import identity_of
from rwkv_peft.data.binidx.reader import BinidxReader, check_tokenizer, find_prefix
from rwkv_peft.data.convert.json_pairs import pairs_of
from rwkv_peft.data.rows.held_out import DocumentSubset
from rwkv_peft.data.rows.pickers import Windows
from rwkv_peft.data.rows.sampling import Part, Samples
from rwkv_peft.errors import DataError

OFF = ("none",)
"""`--val_data_file none`: what lies beside the data is left alone."""


class ValidationSet:
    """Rows as the run trains on them, in batches that every process gets its share of.

    Documents lie in rows as --dataload has it; with `get` and `walk`, rows are windows side by side over the stream.

    Args:
        readers: the pairs.
        config: how documents lie in rows, and what counts (--loss_mask).
        vocab_size: any id must be below.
        origin: where it comes from, in words.
    Raises:
        DataError: as `Samples` has it.
    """

    def __init__(self, readers: Sequence[BinidxReader], config: DataConfig, vocab_size: int, origin: str = "") -> None:
        self.origin = origin
        self.parts = [Samples(reader, config, vocab_size, picker=_windows(reader, config)) for reader in readers]
        self._micro_bsz = config.micro_bsz
        sizes = [part.samples_per_pass for part in self.parts]
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])  # first row of each part

    def __len__(self) -> int:
        """Rows."""
        return int(self._bounds[-1])

    @property
    def documents(self) -> int:
        return sum(len(part.reader) for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(len(part.reader.tokens) for part in self.parts)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What tells it from others, as JSON has it."""
        return [identity_of(part) for part in self.parts]

    @property
    def masks(self) -> tuple[str, ...]:
        """The --loss_mask of each pair."""
        return tuple(part.mask.name for part in self.parts)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """As `Samples.sample`."""
        part = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return self.parts[part].sample(0, 0, index - int(self._bounds[part]))

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
        """This process's share: batches of B rows. All together hold every row once.

        Every process gets the same number of batches of B rows, as ZeRO-3 needs it; where rows run out, rows in which
        nothing counts.
        """
        size = self._micro_bsz
        for first in range(rank * size, -(-len(self) // (size * world_size)) * size * world_size, size * world_size):
            rows = [self.row(index) for index in range(first, min(first + size, len(self)))]
            first_row = self.row(0)
            filling = first_row | {"loss_mask": np.zeros_like(first_row["loss_mask"])}
            rows += [filling] * (size - len(rows))
            yield default_collate(rows)


def _windows(reader: BinidxReader, config: DataConfig) -> Windows | None:
    """For `get` and `walk`, which leave tokens out or go over them twice."""
    return Windows(len(reader.tokens), config.ctx_len) if config.dataload in ("get", "walk") else None


def open_validation(config: DataConfig, vocab_size: int, training: Sequence[Part]) -> ValidationSet | None:
    """What the flags name, what --val_fraction holds out, or the PREFIX_val beside the data; None where nothing is.

    Args:
        config: flags.
        vocab_size: rows of the model's embedding.
        training: the pairs that the run trains on, opened.
    Raises:
        DataError: a pair is missing, damaged, or of another tokenizer; nothing is held out.
    """
    if config.val_fraction:
        origin = f"held out of --data_file, {config.val_fraction:g} of the documents"
        return ValidationSet(_held_out(config, training), config, vocab_size, origin)
    prefixes, origin = config.val_data_file, "--val_data_file"
    if not prefixes:
        prefixes, origin = _beside(config), "found beside --data_file; --val_data_file none leaves it out"
    if not prefixes or prefixes == OFF:
        return None
    readers = [BinidxReader(prefix) for prefix, _ in pairs_of(replace(config, data_file=prefixes))]
    known = next((part.samples.reader.meta for part in training if part.samples.reader.meta), None)
    for reader in readers:
        check_tokenizer(reader, known.tokenizer if known else None, "--data_file")
    return ValidationSet(readers, config, vocab_size, origin)


def _held_out(config: DataConfig, training: Sequence[Part]) -> list[BinidxReader]:
    readers = [part.samples.reader for part in training]
    rests = [reader.rest() for reader in readers if isinstance(reader, DocumentSubset)]
    held_out = [rest for rest in rests if rest is not None]
    if not held_out:
        found = f"{config.val_fraction:g}, which holds out none of {sum(map(len, readers))} documents"
        raise DataError("--val_fraction", "nothing to validate on", found=found, expected="a larger fraction")
    return held_out


def _beside(config: DataConfig) -> tuple[str, ...]:
    """PREFIX_val of a single --data_file PREFIX, as tools/json2binidx.py --val_fraction writes it; () where none is."""
    if len(config.sources) != 1:
        return ()
    prefix = find_prefix(config.sources[0][0]) + "_val"
    return (prefix,) if Path(prefix + ".idx").exists() else ()


def same_documents(validation: ValidationSet, training: Sequence[Part]) -> str | None:
    """The prefix of a validation pair that is a training pair, or a copy of one; None where none is."""
    for one in (part.reader for part in validation.parts):
        for other in (part.samples.reader for part in training):
            if isinstance(one, DocumentSubset) or len(one.tokens) != len(other.tokens):
                continue
            if Path(one.prefix + ".bin").samefile(other.prefix + ".bin") or np.array_equal(one.tokens, other.tokens):
                return one.prefix
    return None
