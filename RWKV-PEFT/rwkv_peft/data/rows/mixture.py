"""Several pairs in one run: `--data_file a:0.7 b:0.3`, still a pure function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader, check_tokenizer
from rwkv_peft.data.convert.json_pairs import pairs_of
from rwkv_peft.data.rows.held_out import training_part
from rwkv_peft.data.rows.order import philox
from rwkv_peft.data.rows.sampling import Part, Samples, Source, check_ids

RESOLUTION = 1000
"""Places of a block, at most: shares that no smaller block gives exactly are rounded to thousandths."""


def open_source(config: DataConfig, vocab_size: int) -> Source:
    """The samples of `config.data_file`, one pair or several, without what --val_fraction holds out. JSON becomes pairs
    first (`json_pairs.py`).

    Raises:
        DataError: a pair is missing, damaged, or does not fit; two were made with different tokenizers.
        ConfigError: as `Samples` has it.
    """
    readers = [BinidxReader(path) for path, _ in pairs_of(config)]
    _check_one_tokenizer(readers)
    if config.val_fraction:
        for reader in readers:
            check_ids(reader, 0, len(reader.tokens), vocab_size)  # while documents have their numbers in the file
        readers = [training_part(reader, config.val_fraction) for reader in readers]
    samples = [Samples(reader, config, vocab_size, number) for number, reader in enumerate(readers)]
    if len(samples) == 1:
        return samples[0]
    return MixedSamples(samples, [weight for _, weight in config.sources])


def _check_one_tokenizer(readers: Sequence[BinidxReader]) -> None:
    known = next((reader.meta.tokenizer for reader in readers if reader.meta is not None), None)
    for reader in readers:
        check_tokenizer(reader, known, "the first --data_file")


class MixedSamples:
    """Rows of several pairs in fixed proportions.

    Rows come in blocks in which pair i has exactly `quotas[i]` places, spread evenly, in an order drawn for each block.
    The n-th row of a pair in the run is the n-th of its own order, so every pair is gone through once before any of
    its rows comes again. A pass is over when every pair has been gone through.

    Args:
        samples: of each pair.
        weights: shares of the rows, in any unit; all None: each pair as large as it is, a pass being each row once.
    """

    def __init__(self, samples: Sequence[Samples], weights: Sequence[float | None]) -> None:
        self._samples = samples
        sizes = [part.samples_per_pass for part in samples]
        self.quotas = sizes if weights[0] is None else _quotas(weights)
        self._block = sum(self.quotas)
        self.samples_per_pass = max(self._rows_for(i, size) for i, size in enumerate(sizes))
        self._kept: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(s, quota / self._block) for s, quota in zip(self._samples, self.quotas, strict=True))

    def sample(self, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
        """As `Samples.sample`."""
        part, own_index = self.place(seed, epoch, index)
        return self._samples[part].sample(seed, epoch, own_index)

    def place(self, seed: int, epoch: int, index: int) -> tuple[int, int]:
        """Which pair row `index` comes from, and the row's number among that pair's."""
        block, place = divmod(index, self._block)
        parts, numbers = self._order(seed, epoch, block)
        part = int(parts[place])
        return part, block * self.quotas[part] + int(numbers[place])

    def _order(self, seed: int, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of a block, (block,): the pair, and which of the pair's places in the block it is."""
        key = (seed, epoch, block)
        if key not in self._kept:
            if len(self._kept) > 1:  # two: a batch may lie across the end of a block
                del self._kept[next(iter(self._kept))]
            parts = np.repeat(np.arange(len(self.quotas)), self.quotas)
            numbers = np.concatenate([np.arange(quota) for quota in self.quotas])
            # Number j of a pair lies at random in [j, j + 1) / quota of the block. 2**32 keeps it apart from Samples.
            draws = philox(seed, epoch, block, 2**32).random_raw(self._block) / 2.0**64
            order = ((numbers + draws) / np.asarray(self.quotas)[parts]).argsort(kind="stable")
            self._kept[key] = parts[order], numbers[order]
        return self._kept[key]

    def _rows_for(self, part: int, size: int) -> int:
        """Rows after which pair `part` has surely given `size`."""
        blocks, rest = divmod(size, self.quotas[part])
        # The first `rest` of a pair lie in the first rest / quota of the block, with at most so many of each other.
        return blocks * self._block + sum(-(-quota * rest // self.quotas[part]) for quota in self.quotas)


def _quotas(weights: Sequence[float]) -> list[int]:
    """Places of each pair in a block, at least 1 each."""
    shares = [weight / sum(weights) for weight in weights]

    def exact(block: int) -> bool:
        return all(round(block * share) and abs(block * share - round(block * share)) < 1e-6 for share in shares)

    block = next((block for block in range(1, RESOLUTION) if exact(block)), RESOLUTION)
    return [max(round(block * share), 1) for share in shares]
