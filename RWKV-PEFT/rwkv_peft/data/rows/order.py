"""Random numbers and orders as functions of (seed, epoch, index).

Philox is counter-based: it computes a random number without the numbers before it. Only its raw 64-bit output is used,
because numpy guarantees that it never changes, but not `Generator.permutation`.
"""

from __future__ import annotations

import numpy as np


def philox(seed: int, epoch: int, number: int, stream: int = 0) -> np.random.Philox:
    """Return a generator that differs for each (seed, epoch, number, stream)."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, number, 0, stream], dtype=np.uint64))


class Shuffle:
    """Random orders of 0..length-1, one after another.

    Each (seed, epoch, round) has its own order. Index i is position i % length of round i // length.

    Args:
        length: number of items.
        stream: random stream, see `philox`.
    """

    def __init__(self, length: int, stream: int) -> None:
        self.length = length
        self._stream = stream
        self._orders: dict[tuple[int, int, int], np.ndarray] = {}

    def __call__(self, seed: int, epoch: int, index: int) -> int:
        round_number, position = divmod(index, self.length)
        return int(self._order(seed, epoch, round_number)[position])

    def _order(self, seed: int, epoch: int, round_number: int) -> np.ndarray:
        """Return the order of a round, (length,) int64: the argsort of random numbers."""
        key = (seed, epoch, round_number)
        if key not in self._orders:
            if len(self._orders) > 1:  # keep two, because a batch may span the end of a round
                del self._orders[next(iter(self._orders))]
            self._orders[key] = philox(*key, self._stream).random_raw(self.length).argsort(kind="stable")
        return self._orders[key]
