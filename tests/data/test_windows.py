"""Batches know how many tokens train in their optimizer step."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_peft.data.windows import WindowLoader

COUNTS = [3, 0, 5, 1, 2, 4, 0, 0, 7]
"""Tokens that train, by row of 8."""


class Rows:
    def __len__(self) -> int:
        return len(COUNTS)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"row": np.array(index), "loss_mask": np.arange(8) < COUNTS[index]}


@pytest.mark.parametrize(
    ("window", "in_windows"),
    [(1, COUNTS), (3, [8, 7, 7]), (4, [9, 6, 7]), (9, [22]), (20, [22])],
)
def test_the_first_batch_of_a_window_counts_all_of_it(window, in_windows):
    """Also where the last window of an epoch is shorter."""
    batches = list(WindowLoader(Rows(), batch_size=1, window=window))
    assert [int(batch["row"]) for batch in batches] == list(range(len(COUNTS))), "in order, each once"
    assert [batch["tokens"] for batch in batches] == COUNTS
    firsts = [number for number, batch in enumerate(batches) if "window_tokens" in batch]
    assert firsts == list(range(0, len(COUNTS), window))
    assert [batches[number]["window_tokens"] for number in firsts] == in_windows


def test_it_reads_no_further_than_one_window():
    read: list[int] = []

    class Watched(Rows):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            read.append(index)
            return super().__getitem__(index)

    batches = iter(WindowLoader(Watched(), batch_size=1, window=3))
    for _ in range(3):
        next(batches)
        assert read == [0, 1, 2]
    next(batches)
    assert read == [0, 1, 2, 3, 4, 5]


def test_a_batch_counts_all_its_rows():
    batches = list(WindowLoader(Rows(), batch_size=2, window=2))
    assert [batch["tokens"] for batch in batches] == [3, 6, 6, 0, 7]
    assert len(batches) == len(WindowLoader(Rows(), batch_size=2, window=2))
