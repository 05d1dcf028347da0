"""Random numbers and orders that are computed, not drawn one after another.

Philox is counter-based: the number of (seed, epoch, index) does not need the ones before it. Only raw 64-bit output is
used, because numpy promises to keep that for ever, and `Generator.permutation` not.
"""

from __future__ import annotations

import numpy as np


def philox(seed: int, epoch: int, number: int, source: int = 0) -> np.random.Philox:
    """A random stream of its own for each (seed, epoch, number, source); `source` numbers the --data_file."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, number, 0, source], dtype=np.uint64))


class Shuffle:
    """0..length-1 in an order of its own for each (seed, epoch, round): index goes through round 0, then 1, ..."""

    def __init__(self, length: int, source: int) -> None:
        self.length = length
        self._source = source
        self._kept: dict[tuple[int, int, int], np.ndarray] = {}

    def __call__(self, seed: int, epoch: int, index: int) -> int:
        round_number, place = divmod(index, self.length)
        return int(self._order(seed, epoch, round_number)[place])

    def _order(self, seed: int, epoch: int, round_number: int) -> np.ndarray:
        """(length,) int64: the order of as many random numbers."""
        key = (seed, epoch, round_number)
        if key not in self._kept:
            if len(self._kept) > 1:  # two: a batch may lie across the end of a round
                del self._kept[next(iter(self._kept))]
            self._kept[key] = philox(*key, self._source).random_raw(self.length).argsort(kind="stable")
        return self._kept[key]
