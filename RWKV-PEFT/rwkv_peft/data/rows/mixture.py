"""Mixes the rows of several pairs (`--data_file a:0.7 b:0.3`), as a pure function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_peft.data.rows.order import philox
from rwkv_peft.data.rows.sampling import Part, Samples

MAX_BLOCK = 1000
"""Largest number of rows in a block. Shares that no smaller block gives exactly are rounded to thousandths."""


class MixedSamples:
    """The rows of several pairs in fixed proportions.

    Rows come in blocks. In each block, pair i has exactly `quotas[i]` rows, spread evenly, in a random order. The n-th
    row of a pair in the run is the n-th row in the pair's own order, so each pair repeats a row only after all its
    rows have been used. A pass ends when the rows of every pair have been used.

    Args:
        samples: one for each pair.
        weights: shares of the rows, in any unit. All None: shares in proportion to the sizes, so that a pass has each
            row once.
    """

    def __init__(self, samples: Sequence[Samples], weights: Sequence[float | None]) -> None:
        self._samples = samples
        sizes = [part.samples_per_pass for part in samples]
        self.quotas = sizes if weights[0] is None else _quotas(weights)
        self._block = sum(self.quotas)
        self.samples_per_pass = max(self._rows_for(i, size) for i, size in enumerate(sizes))
        self._orders: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(s, quota / self._block) for s, quota in zip(self._samples, self.quotas, strict=True))

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
        """See `Samples.sample`."""
        part, index_in_part = self.locate(seed, epoch, index)
        return self._samples[part].sample(seed, epoch, index_in_part)

    def locate(self, seed: int, epoch: int, index: int) -> tuple[int, int]:
        """Return the pair of row `index`, and the row's index among those of this pair."""
        block, position = divmod(index, self._block)
        parts, numbers = self._order(seed, epoch, block)
        part = int(parts[position])
        return part, block * self.quotas[part] + int(numbers[position])

    def _order(self, seed: int, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pair of each row of a block, and the row's number among those of the pair in the block.

        Two arrays of (block,) int64.
        """
        key = (seed, epoch, block)
        if key not in self._orders:
            if len(self._orders) > 1:  # keep two, because a batch may span the end of a block
                del self._orders[next(iter(self._orders))]
            parts = np.repeat(np.arange(len(self.quotas)), self.quotas)
            numbers = np.concatenate([np.arange(quota) for quota in self.quotas])
            # Row j of a pair gets a random position in [j, j + 1) / quota of the block. The stream number 2**32 differs
            # from those that Samples uses.
            draws = philox(seed, epoch, block, 2**32).random_raw(self._block) / 2.0**64
            order = ((numbers + draws) / np.asarray(self.quotas)[parts]).argsort(kind="stable")
            self._orders[key] = parts[order], numbers[order]
        return self._orders[key]

    def _rows_for(self, part: int, size: int) -> int:
        """Return a number of rows that contains at least `size` rows of pair `part`."""
        blocks, rest = divmod(size, self.quotas[part])
        # The first `rest` rows of a pair are in the first rest / quota of the block, with at most this share of others.
        return blocks * self._block + sum(-(-quota * rest // self.quotas[part]) for quota in self.quotas)


def _quotas(weights: Sequence[float]) -> list[int]:
    """Return the rows of each pair in a block, at least 1 each."""
    shares = [weight / sum(weights) for weight in weights]

    def exact(block: int) -> bool:
        return all(round(block * share) and abs(block * share - round(block * share)) < 1e-6 for share in shares)

    block = next((block for block in range(1, MAX_BLOCK) if exact(block)), MAX_BLOCK)
    return [max(round(block * share), 1) for share in shares]
