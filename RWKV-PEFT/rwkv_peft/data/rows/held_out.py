"""Documents held out by a hash of what they say: the same ones whatever their order is, and whatever else is there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.errors import DataError

_DOCUMENTS = 1024
"""Read at a time."""


class HoldOut:
    """The rule: a share of all contents, chosen by their hash.

    Args:
        fraction: from 0 to 1, 1 excluded.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self._below = int(fraction * 2**64)

    def __bool__(self) -> bool:
        return self._below > 0

    def __call__(self, content: bytes | memoryview) -> bool:
        """Whether a document of that content is held out."""
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") < self._below


class DocumentSubset(BinidxReader):
    """Some documents of a pair, as if they were all of it: its stream is theirs, one after another.

    Args:
        reader: the pair; of its tokens nothing is copied.
        chosen: (documents,) bool, at least one of them True.
    """

    def __init__(self, reader: BinidxReader, chosen: np.ndarray) -> None:
        self.prefix, self.meta, self.mask = reader.prefix, reader.meta, reader.mask
        self._whole, self._chosen = reader, chosen
        self.bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(reader.sizes[chosen])])
        # Where stretches of chosen documents begin and end: first, one past the last, first, one past the last, ...
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
        self.tokens = _Stream(reader.tokens, reader.bounds[edges[::2]], reader.bounds[edges[1::2]])

    def rest(self) -> DocumentSubset | None:
        """The documents of the pair that are not here; None where all are."""
        return None if self._chosen.all() else DocumentSubset(self._whole, ~self._chosen)

    def trained(self, start: int, stop: int) -> np.ndarray:
        parts = [self._whole.trained(*place) for place in self.tokens.places(start, stop)]
        return np.concatenate([np.zeros(0, dtype=bool), *parts])


class _Stream:
    """Stretches of an array in a row, read as one array is.

    Args:
        tokens: (N,), any dtype.
        starts, stops: (stretches,) int64, ascending.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        self.dtype = tokens.dtype
        self._tokens, self._starts = tokens, starts
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - starts)])  # where each begins here

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, key: int | slice | np.ndarray) -> np.ndarray:
        """A place, a slice of step 1, or an array of places."""
        if not isinstance(key, slice):
            stretch = np.searchsorted(self._bounds, key, side="right") - 1
            return self._tokens[key - self._bounds[stretch] + self._starts[stretch]]
        start, stop, _ = key.indices(len(self))
        parts = [self._tokens[slice(*place)] for place in self.places(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where start..stop lies in the array: first and one past the last, stretch after stretch."""
        stretch = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._bounds[stretch + 1]))
            shift = int(self._starts[stretch] - self._bounds[stretch])
            yield start + shift, end + shift
            start, stretch = end, stretch + 1


def training_part(reader: BinidxReader, fraction: float) -> DocumentSubset:
    """The documents of a pair that are not held out; its `rest()` is what is. Reads the whole pair once.

    The hash is of a document's token ids, not of their storage: of two pairs of the same text and tokenizer the same
    documents are held out.

    Raises:
        DataError: all documents are held out.
    """
    rule = HoldOut(fraction)
    kept = np.array([not rule(content) for content in _contents(reader)])
    if not kept.any():
        found = f"all {len(reader)} documents of {reader.prefix} held out"
        raise DataError("--val_fraction", "nothing is left to train on", found=found, expected="a smaller fraction")
    return DocumentSubset(reader, kept)


def _contents(reader: BinidxReader) -> Iterator[memoryview]:
    """The ids of each document as bytes of <u4; converted many at a time, which takes a tenth of the time."""
    for first in range(0, len(reader), _DOCUMENTS):
        bounds = reader.bounds[first : first + _DOCUMENTS + 1]
        ids = memoryview(reader.tokens[bounds[0] : bounds[-1]].astype("<u4").tobytes())
        places = (4 * (bounds - bounds[0])).tolist()
        for start, stop in itertools.pairwise(places):
            yield ids[start:stop]
