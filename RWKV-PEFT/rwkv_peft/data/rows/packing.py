"""Best-fit packing: which documents share a row of `--dataload pack`."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack_rows(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into rows, longest first, each where it leaves the least room (best-fit decreasing).

    Items of one size go in together and rows with equal room are one heap, so that the work is that of the different
    sizes and not of the items: a million documents take about a second.

    Args:
        sizes: (N,) int64, each from 0 to `capacity`. Items of size 0 go nowhere.
        capacity: of a row.
    Returns:
        items (M,) int64, the M items that go somewhere, row after row; bounds (rows + 1,) int64: where each row begins
        in `items`, and where the last ends.
    """
    order = np.argsort(-sizes, kind="stable")  # (N,)
    order = order[: int(np.count_nonzero(sizes))]
    row_of = np.empty(len(order), dtype=np.int64)
    rows = _Rows(capacity)
    lengths, counts = np.unique(sizes[order], return_counts=True)
    place = 0
    for size, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for row_numbers, each in rows.take(size, count):
            filled = np.repeat(row_numbers, each)
            row_of[place : place + len(filled)] = filled
            place += len(filled)
    by_row = np.argsort(row_of, kind="stable")
    bounds = np.zeros(rows.count + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows.count), out=bounds[1:])
    return order[by_row], bounds


class _Rows:
    """The rows begun so far, by the room left in them."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self._capacity = capacity
        self._rooms: list[int] = []  # ascending: the keys of _with_room
        self._with_room: dict[int, list[int]] = {}

    def take(self, size: int, count: int):
        """Place `count` items of `size`; yields ([row numbers], items that each of them takes)."""
        while count:
            room, rows = self._tightest(size, count)
            each = min(room // size, count)  # best fit comes back to a row while another item fits
            chosen = rows[-(count // each) :]
            del rows[len(rows) - len(chosen) :]
            if not rows:
                self._forget(room)
            self._keep(room - each * size, chosen)
            count -= each * len(chosen)
            yield chosen, each

    def _tightest(self, size: int, count: int) -> tuple[int, list[int]]:
        """The rows with the least room that `size` fits into; new ones where there is none."""
        place = bisect_left(self._rooms, size)
        if place < len(self._rooms):
            room = self._rooms[place]
            return room, self._with_room[room]
        new = max(count // (self._capacity // size), 1)
        self.count += new
        return self._capacity, list(range(self.count - new, self.count))

    def _forget(self, room: int) -> None:
        if room in self._with_room:
            del self._with_room[room]
            del self._rooms[bisect_left(self._rooms, room)]

    def _keep(self, room: int, rows: list[int]) -> None:
        if room not in self._with_room:
            insort(self._rooms, room)
            self._with_room[room] = []
        self._with_room[room] += rows
