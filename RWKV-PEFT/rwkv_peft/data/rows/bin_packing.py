"""Best-fit packing of documents into rows, for `--dataload pack`."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack_rows(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into rows, longest first, each into the row that it fills best (best-fit decreasing).

    Items of the same size are placed together, and rows with the same free space are one list. So the Python loops run
    once for each different size, and only NumPy handles single items: a million documents take about a second.

    Args:
        sizes: (N,) int64, each from 0 to `capacity`. Items of size 0 are in no row.
        capacity: size of a row.
    Returns:
        items: (M,) int64, the numbers of the M items that are not empty, row after row.
        bounds: (rows + 1,) int64, the index in `items` at which each row begins, and the end of the last row.
    """
    order = np.argsort(-sizes, kind="stable")  # (N,)
    order = order[: int(np.count_nonzero(sizes))]
    row_of = np.empty(len(order), dtype=np.int64)
    rows = _Rows(capacity)
    lengths, counts = np.unique(sizes[order], return_counts=True)
    position = 0
    for size, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for row_numbers, each in rows.take(size, count):
            filled = np.repeat(row_numbers, each)
            row_of[position : position + len(filled)] = filled
            position += len(filled)
    by_row = np.argsort(row_of, kind="stable")
    bounds = np.zeros(rows.count + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows.count), out=bounds[1:])
    return order[by_row], bounds


class _Rows:
    """The rows so far, by their free space."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._capacity = capacity
        self._spaces: list[int] = []  # the keys of _by_space, ascending
        self._by_space: dict[int, list[int]] = {}

    def take(self, size: int, count: int):
        """Place `count` items of `size`. Yields row numbers, and the number of items that each of these rows gets."""
        while count:
            space, rows = self._best_fit(size, count)
            each = min(space // size, count)  # keep adding items of this size while they fit
            chosen = rows[-(count // each) :]
            del rows[len(rows) - len(chosen) :]
            if not rows:
                self._remove(space)
            self._add(space - each * size, chosen)
            count -= each * len(chosen)
            yield chosen, each

    def _best_fit(self, size: int, count: int) -> tuple[int, list[int]]:
        """Return the smallest free space that `size` fits into and its rows, or new rows if there is none."""
        position = bisect_left(self._spaces, size)
        if position < len(self._spaces):
            space = self._spaces[position]
            return space, self._by_space[space]
        new = max(count // (self._capacity // size), 1)
        self.count += new
        return self._capacity, list(range(self.count - new, self.count))

    def _remove(self, space: int) -> None:
        if space in self._by_space:
            del self._by_space[space]
            del self._spaces[bisect_left(self._spaces, space)]

    def _add(self, space: int, rows: list[int]) -> None:
        if space not in self._by_space:
            insort(self._spaces, space)
            self._by_space[space] = []
        self._by_space[space] += rows
