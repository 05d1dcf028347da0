"""The split into training and validation documents, by a hash of each document's content.

The side of a document depends neither on the order of the documents nor on the other documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.errors import DataError

_DOCUMENTS_PER_READ = 1024


class ValidationSplit:
    """Decides which contents are for validation.

    Args:
        fraction: share of all contents that is for validation, from 0 to 1 (excluded).
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self._threshold = int(fraction * 2**64)

    def __bool__(self) -> bool:
        """Return whether any content can be for validation."""
        return self._threshold > 0

    def is_validation(self, content: bytes | memoryview) -> bool:
        """Return whether a document with this content is for validation."""
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") < self._threshold


class DocumentSubset(BinidxReader):
    """Some documents of a pair, read as a pair of their own.

    Args:
        reader: the pair. Its tokens are not copied.
        selected: (documents,) bool, at least one of them True.
    """

    def __init__(self, reader: BinidxReader, selected: np.ndarray) -> None:
        self.prefix, self.meta, self.mask = reader.prefix, reader.meta, reader.mask
        self._reader, self._selected = reader, selected
        self.bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(reader.sizes[selected])])
        # First document of each run of selected documents, first one after it, first of the next run, ...
        edges = np.flatnonzero(np.diff(selected.astype(np.int8), prepend=0, append=0))
        self.tokens = _JoinedRanges(reader.tokens, reader.bounds[edges[::2]], reader.bounds[edges[1::2]])

    def complement(self) -> DocumentSubset | None:
        """Return the other documents of the pair; None if there are none."""
        return None if self._selected.all() else DocumentSubset(self._reader, ~self._selected)

    def trained(self, start: int, stop: int) -> np.ndarray:
        """See `BinidxReader.trained`."""
        parts = [self._reader.trained(*piece) for piece in self.tokens.source_ranges(start, stop)]
        return np.concatenate([np.zeros(0, dtype=bool), *parts])


class _JoinedRanges:
    """Ranges of an array, one after another, read like one array.

    Args:
        tokens: (N,), any dtype.
        starts, stops: (ranges,) int64, ascending.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        self.dtype = tokens.dtype
        self._tokens, self._starts = tokens, starts
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - starts)])  # of the ranges, joined

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        """Read a position, a slice of step 1, or an array of positions."""
        if not isinstance(key, slice):
            number = np.searchsorted(self._bounds, key, side="right") - 1
            return self._tokens[key - self._bounds[number] + self._starts[number]]
        start, stop, _ = key.indices(len(self))
        parts = [self._tokens[slice(*piece)] for piece in self.source_ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])

    def source_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, stop) pairs in the source array that make up start..stop here."""
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._bounds[number + 1]))
            shift = int(self._starts[number] - self._bounds[number])
            yield start + shift, end + shift
            start, number = end, number + 1


def training_documents(reader: BinidxReader, fraction: float) -> DocumentSubset:
    """Return the training documents of a pair; their `complement()` is for validation. Reads the whole pair once.

    The hash is of a document's token ids, not of how they are stored: two pairs made from the same text with the same
    tokenizer are split alike.

    Raises:
        DataError: all documents are for validation.
    """
    split = ValidationSplit(fraction)
    selected = np.array([not split.is_validation(content) for content in _contents(reader)])
    if not selected.any():
        found = f"{fraction:g}, which takes all {len(reader)} documents of {reader.prefix}"
        raise DataError(
            "--val_fraction", "no document is left for training", found=found, expected="a smaller fraction"
        )
    return DocumentSubset(reader, selected)


def _contents(reader: BinidxReader) -> Iterator[memoryview]:
    """Yield the ids of each document as bytes of `<u4`. Converting many at a time is ten times faster."""
    for first in range(0, len(reader), _DOCUMENTS_PER_READ):
        bounds = reader.bounds[first : first + _DOCUMENTS_PER_READ + 1]
        ids = memoryview(reader.tokens[bounds[0] : bounds[-1]].astype("<u4").tobytes())
        offsets = (4 * (bounds - bounds[0])).tolist()
        for start, stop in itertools.pairwise(offsets):
            yield ids[start:stop]
