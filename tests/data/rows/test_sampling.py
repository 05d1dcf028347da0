from __future__ import annotations

import struct
from collections import Counter

import numpy as np
import pytest

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows import sampling
from rwkv_peft.data.rows.sampling import DataPlan, Samples, make_plan
from rwkv_peft.errors import DataError
from tests.data.pairs import index_bytes, write_files

STREAM = [list(range(1, 101))]  # one document; the value of each token is its position, counted from 1


def make_samples(prefix: str, vocab_size: int = 65536, **settings) -> Samples:
    return Samples(BinidxReader(prefix), DataConfig(data_file=prefix, **settings), vocab_size)


def numbered_documents(count: int) -> list[list[int]]:
    """Document i has token i + 1 and eod."""
    return [[i + 1, 0] for i in range(count)]


def rows_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "only", "pack"])
def test_sample_is_a_pure_function(write_pair, dataload):
    prefix = write_pair([list(range(i, i + 12)) for i in range(1, 60)])
    keys = [(seed, epoch, index) for seed in (0, 7) for epoch in (0, 1) for index in (0, 3, 58, 59, 200)]
    settings = {"dataload": dataload, "ctx_len": 8, "micro_bsz": 1, "long": "split"}
    first = make_samples(prefix, **settings)
    forward = {key: first.sample(*key) for key in keys}
    second = make_samples(prefix, **settings)
    assert all(rows_equal(forward[key], second.sample(*key)) for key in reversed(keys))
    different = len({row["input_ids"].tobytes() for row in forward.values()})
    assert different == 5 if dataload == "walk" else different > len(keys) / 2  # the walk knows the index alone


def test_the_order_never_changes(write_pair):
    """A run of an older version must resume with the same data."""
    get = make_samples(write_pair(STREAM, name="get"), dataload="get", ctx_len=9)
    numbered = write_pair(numbered_documents(10), name="pad")
    pad = make_samples(numbered, dataload="pad", ctx_len=9)
    pack = make_samples(numbered, dataload="pack", ctx_len=3)
    assert [int(get.sample(42, 1, i)["input_ids"][0]) for i in range(8)] == [41, 73, 14, 69, 4, 26, 51, 27]
    assert [int(pad.sample(42, 1, i)["input_ids"][0]) for i in range(10)] == [5, 10, 6, 4, 1, 3, 8, 2, 7, 9]
    assert [int(pack.sample(42, 1, i)["input_ids"][0]) for i in range(5)] == [9, 7, 1, 5, 3]


def test_get_chooses_all_windows_equally_often(write_pair):
    samples = make_samples(write_pair(STREAM), dataload="get", ctx_len=90)
    rows = [samples.sample(0, 0, i) for i in range(2000)]
    for row in rows[:50]:
        start = row["input_ids"][0]
        assert row["input_ids"].tolist() == list(range(start, start + 90))
        assert row["targets"].tolist() == list(range(start + 1, start + 91))
        assert row["loss_mask"].all()
    starts = Counter(int(row["input_ids"][0]) for row in rows)
    assert sorted(starts) == list(range(1, 11))
    assert min(starts.values()) > 140  # 200 +- 13 expected; 140 is 4.5 deviations away


def test_types_and_shapes(write_pair):
    row = make_samples(write_pair(STREAM), ctx_len=9).sample(0, 0, 0)
    assert {key: (value.shape, value.dtype) for key, value in row.items()} == {
        "input_ids": ((9,), np.int64),
        "targets": ((9,), np.int64),
        "loss_mask": ((9,), np.bool_),
    }


def test_pad_uses_all_documents_before_it_repeats_one(write_pair):
    samples = make_samples(write_pair(numbered_documents(23)), dataload="pad", ctx_len=4)
    order = [int(samples.sample(5, 2, i)["input_ids"][0]) for i in range(3 * 23)]
    rounds = [tuple(order[i : i + 23]) for i in range(0, 3 * 23, 23)]
    assert all(sorted(documents) == list(range(1, 24)) for documents in rounds)
    assert len(set(rounds)) == 3
    assert tuple(int(samples.sample(5, 3, i)["input_ids"][0]) for i in range(23)) not in rounds


@pytest.mark.parametrize("loss_mask", ["none", "pad"])
def test_padding_is_masked_by_length_and_not_by_value(write_pair, loss_mask):
    samples = make_samples(write_pair([[5, 0, 0, 6, 0]]), dataload="pad", ctx_len=7, loss_mask=loss_mask)
    row = samples.sample(0, 0, 0)
    assert row["input_ids"].tolist() == [5, 0, 0, 6, 0, 0, 0]
    assert row["targets"].tolist() == [0, 0, 6, 0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [True] * 4 + [False] * 3


@pytest.mark.parametrize(("length", "trained"), [(1, 0), (2, 1), (4, 3), (5, 4), (6, 4), (50, 4)])
def test_pad_cuts_long_documents_and_fills_short_ones(write_pair, length, trained):
    prefix = write_pair([list(range(1, length + 1)), list(range(1, length + 1)), [3, 0]])
    samples = make_samples(prefix, dataload="pad", ctx_len=4)
    rows = [samples.sample(0, 0, i) for i in range(3)]
    assert sorted(int(row["loss_mask"].sum()) for row in rows) == sorted([trained, trained, 1])
    for row in rows:
        assert row["targets"][row["loss_mask"]].tolist() in (list(range(2, 2 + trained)), [0])


@pytest.mark.parametrize("dataload", ["get", "pad"])
def test_data_shorter_than_a_row_is_padded(write_pair, dataload):
    row = make_samples(write_pair([[8, 9, 0]]), dataload=dataload, ctx_len=6).sample(1, 2, 3)
    assert row["input_ids"].tolist() == [8, 9, 0, 0, 0, 0]
    assert row["targets"].tolist() == [9, 0, 0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("dataload", ["get", "pad"])
def test_rows_of_one_token(write_pair, dataload):
    row = make_samples(write_pair([[8, 0]]), dataload=dataload, ctx_len=1).sample(0, 0, 0)
    assert [row[key].tolist() for key in ("input_ids", "targets", "loss_mask")] == [[8], [0], [True]]


@pytest.mark.parametrize(("dataload", "documents"), [("get", [[0]]), ("pad", [[0], [1]])])
def test_data_with_nothing_to_predict_is_an_error(write_pair, dataload, documents):
    with pytest.raises(DataError, match=r"pair\.bin: there is nothing to predict"):
        make_samples(write_pair(documents), dataload=dataload)


BEYOND = [[1, 2, 0], [3, 299, 300, 0], [4, 0]]


def test_id_outside_the_vocabulary_is_found_on_opening(write_pair):
    prefix = write_pair(BEYOND)
    make_samples(prefix, vocab_size=301)
    with pytest.raises(DataError, match=r"pair\.bin: .*300 at token 2 of document 1, expected 0 to 299"):
        make_samples(prefix, vocab_size=300)


@pytest.mark.parametrize("dataload", ["get", "walk", "pad", "only", "pack"])
def test_id_outside_the_vocabulary_is_found_in_a_row_of_long_data(write_pair, monkeypatch, dataload):
    monkeypatch.setattr(sampling, "CHECK_ALL_UP_TO", 0)
    samples = make_samples(write_pair(BEYOND), vocab_size=300, dataload=dataload, ctx_len=6, micro_bsz=1)
    with pytest.raises(DataError, match=r"300 at token 2 of document 1"):
        [samples.sample(0, 0, i) for i in range(20)]


def test_id_outside_the_vocabulary_is_found_after_the_first_chunk(write_pair, monkeypatch):
    monkeypatch.setattr(sampling, "_CHECK_CHUNK", 4)
    with pytest.raises(DataError, match=r"300 at token 2 of document 1"):
        make_samples(write_pair(BEYOND), vocab_size=300)


def test_negative_id_is_outside_the_vocabulary(tmp_path):
    prefix = write_files(tmp_path / "pair", index_bytes([3], code=4, itemsize=4), struct.pack("<3i", 5, -1, 0))
    with pytest.raises(DataError, match=r"-1 at token 1 of document 0"):
        make_samples(prefix, vocab_size=300)


def plan_of(prefix: str, world_size: int = 1, **settings) -> DataPlan:
    return make_plan(make_samples(prefix, **settings), DataConfig(**settings), world_size)


def test_plan_of_pad(write_pair):
    """5 documents of 2, 3, 5, 6, 50 tokens in rows of 4 targets: 1 + 2 + 4 + 4 + 4 of 20 targets are not padding."""
    prefix = write_pair([[1] * n for n in (2, 3, 5, 6, 50)])
    assert plan_of(prefix, world_size=2, dataload="pad", ctx_len=4, micro_bsz=2, epoch_count=3) == DataPlan(
        documents=5,
        tokens=66,
        samples_per_pass=5,
        steps_per_epoch=2,
        passes=3 * 8 / 5,
        truncated=2,
        padding=pytest.approx(0.25),
        targets=15,
        masks=("pad",),
        untrained_documents=0,
        wraps=False,
    )


@pytest.mark.parametrize(("tokens", "steps", "padding"), [(101, 5, 0), (102, 6, 0), (5, 1, 0.6)])
def test_plan_of_get_is_one_pass(write_pair, tokens, steps, padding):
    plan = plan_of(write_pair([[1] * tokens]), dataload="get", ctx_len=10, micro_bsz=2)
    assert (plan.steps_per_epoch, plan.truncated, plan.padding) == (steps, 0, pytest.approx(padding))


@pytest.mark.parametrize(
    ("epoch_steps", "passes", "wraps"), [(7, 3.5, True), (3, 1.5, True), (2, 1, False), (1, 0.5, False)]
)
def test_epoch_steps_override_the_pass(write_pair, epoch_steps, passes, wraps):
    plan = plan_of(write_pair(numbered_documents(4)), dataload="pad", ctx_len=10, micro_bsz=2, epoch_steps=epoch_steps)
    assert (plan.steps_per_epoch, plan.passes, plan.wraps) == (epoch_steps, passes, wraps)
