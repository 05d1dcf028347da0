"""The validation set: all rows of some pairs, each once, in a fixed order.

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
from rwkv_peft.data.rows.row_types import ConsecutiveWindows
from rwkv_peft.data.rows.sampling import Part, Samples
from rwkv_peft.data.rows.validation_split import DocumentSubset
from rwkv_peft.errors import DataError

OFF = ("none",)
"""`--val_data_file none`: do not use PREFIX_val."""


class ValidationSet:
    """Rows as in training, in batches that are sharded over the processes.

    --dataload decides how documents become rows. With `get` and `walk`, rows are consecutive windows instead, because
    these two skip and repeat tokens.

    Args:
        readers: the pairs.
        config: how documents become rows, and which tokens are in the loss (--loss_mask).
        vocab_size: all token ids must be smaller.
        origin: where the pairs come from, for the summary at the start.
    Raises:
        DataError: see `Samples`.
    """

    def __init__(self, readers: Sequence[BinidxReader], config: DataConfig, vocab_size: int, origin: str = "") -> None:
        self.origin = origin
        self.parts = [Samples(reader, config, vocab_size, picker=_windows(reader, config)) for reader in readers]
        self._micro_bsz = config.micro_bsz
        sizes = [part.samples_per_pass for part in self.parts]
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])  # first row of each pair

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._bounds[-1])

    @property
    def documents(self) -> int:
        """Documents of all pairs."""
        return sum(len(part.reader) for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of all pairs."""
        return sum(len(part.reader.tokens) for part in self.parts)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """The identities of the pairs, ready for JSON; see `identity_of`."""
        return [identity_of(part) for part in self.parts]

    @property
    def masks(self) -> tuple[str, ...]:
        """The --loss_mask of each pair."""
        return tuple(part.mask.name for part in self.parts)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return a row; see `Samples.sample`."""
        part = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return self.parts[part].sample(0, 0, index - int(self._bounds[part]))

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
        """Yield this process's batches of B rows. All processes together get every row once.

        All processes get the same number of full batches, as ZeRO-3 requires. The last ones are filled with rows whose
        loss mask is all False.
        """
        size = self._micro_bsz
        for first in range(rank * size, -(-len(self) // (size * world_size)) * size * world_size, size * world_size):
            rows = [self.row(index) for index in range(first, min(first + size, len(self)))]
            first_row = self.row(0)
            filler = first_row | {"loss_mask": np.zeros_like(first_row["loss_mask"])}
            rows += [filler] * (size - len(rows))
            yield default_collate(rows)


def _windows(reader: BinidxReader, config: DataConfig) -> ConsecutiveWindows | None:
    """Return the picker for `get` and `walk`; None for the others."""
    return ConsecutiveWindows(len(reader.tokens), config.ctx_len) if config.dataload in ("get", "walk") else None


def open_validation(config: DataConfig, vocab_size: int, training: Sequence[Part]) -> ValidationSet | None:
    """Open the pairs of --val_data_file, the documents of --val_fraction, or PREFIX_val if it exists.

    Args:
        config: the data flags.
        vocab_size: rows of the model's embedding.
        training: the training pairs.
    Returns:
        None if there is nothing to validate on.
    Raises:
        DataError: a pair is missing, damaged, or was made with a different tokenizer; or --val_fraction selects no
            document.
    """
    if config.val_fraction:
        origin = f"{config.val_fraction:g} of the documents of --data_file"
        return ValidationSet(_validation_documents(config, training), config, vocab_size, origin)
    prefixes, origin = config.val_data_file, "--val_data_file"
    if not prefixes:
        prefixes, origin = _default_prefixes(config), "found next to --data_file; --val_data_file none turns it off"
    if not prefixes or prefixes == OFF:
        return None
    readers = [BinidxReader(prefix) for prefix, _ in pairs_of(replace(config, data_file=prefixes))]
    known = next((part.samples.reader.meta for part in training if part.samples.reader.meta), None)
    for reader in readers:
        check_tokenizer(reader, known.tokenizer if known else None, "--data_file")
    return ValidationSet(readers, config, vocab_size, origin)


def _validation_documents(config: DataConfig, training: Sequence[Part]) -> list[BinidxReader]:
    readers = [part.samples.reader for part in training]
    complements = [reader.complement() for reader in readers if isinstance(reader, DocumentSubset)]
    validation = [reader for reader in complements if reader is not None]
    if not validation:
        found = f"{config.val_fraction:g}, which takes none of the {sum(map(len, readers))} documents"
        raise DataError(
            "--val_fraction", "no document is left for validation", found=found, expected="a larger fraction"
        )
    return validation


def _default_prefixes(config: DataConfig) -> tuple[str, ...]:
    """Return PREFIX_val if it exists for a single --data_file PREFIX. tools/json2binidx.py --val_fraction writes it."""
    if len(config.sources) != 1:
        return ()
    prefix = find_prefix(config.sources[0][0]) + "_val"
    return (prefix,) if Path(prefix + ".idx").exists() else ()


def same_documents(validation: ValidationSet, training: Sequence[Part]) -> str | None:
    """Return the prefix of a validation pair that is also a training pair, or a copy of one; None if there is none."""
    for one in (part.reader for part in validation.parts):
        for other in (part.samples.reader for part in training):
            if isinstance(one, DocumentSubset) or len(one.tokens) != len(other.tokens):
                continue
            if Path(one.prefix + ".bin").samefile(other.prefix + ".bin") or np.array_equal(one.tokens, other.tokens):
                return one.prefix
    return None
