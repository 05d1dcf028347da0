from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.rows.bin_packing import pack_rows


def rows_of(sizes, capacity: int) -> list[list[int]]:
    items, bounds = pack_rows(np.asarray(sizes, dtype=np.int64), capacity)
    return [items[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def best_fit_one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Return the free space of each row of textbook best-fit decreasing."""
    rooms: list[int] = []
    for size in sorted((size for size in sizes if size), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=rooms.__getitem__)] -= size
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c), max_size=60))))
def test_packing_equals_best_fit_decreasing_item_by_item(case):
    capacity, sizes = case
    rows = rows_of(sizes, capacity)
    assert sorted(item for row in rows for item in row) == [i for i, size in enumerate(sizes) if size]
    rooms = [capacity - sum(sizes[item] for item in row) for row in rows]
    assert sorted(rooms) == best_fit_one_by_one(sizes, capacity)


def test_a_chat_like_distribution_fills_98_percent_of_each_row():
    """Lognormal lengths with median 300 and 95th percentile 1500 tokens, truncated to rows of 2048."""
    sizes = np.random.default_rng(0).lognormal(np.log(300), np.log(5) / 1.645, 20_000).astype(np.int64)
    sizes = np.clip(sizes, 2, 2049)
    rows = rows_of(sizes, 2049)
    trained = [sum(sizes[item] - 1 for item in row) / 2048 for row in rows]  # a document's first token is no target
    assert np.mean(trained) > 0.98
