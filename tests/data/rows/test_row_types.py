"""An epoch has exactly the tokens of the data, with every row picker."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.datamodule import StepSampler
from rwkv_peft.data.rows.row_types import Pieces, make_picker
from rwkv_peft.data.rows.sampling import Samples, make_plan
from rwkv_peft.errors import ConfigError, DataError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda sizes: max(sizes) > 1)
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def numbered(sizes: list[int]) -> list[list[int]]:
    """Return documents whose tokens are numbered from 1 through all of them, so a token shows its position."""
    bounds = np.cumsum([0, *sizes])
    return [list(range(a + 1, b + 1)) for a, b in itertools.pairwise(bounds)]


def epoch_on(samples: Samples, config: DataConfig, world_size: int) -> list[dict[str, np.ndarray]]:
    """Return the rows of an epoch of one pass from all ranks, without the filler rows at its end."""
    steps = make_plan(samples, config, world_size).steps_per_epoch
    sizes = {"micro_batches": steps, "per_step": 2, "micro_bsz": config.micro_bsz, "world_size": world_size}
    ranks = [StepSampler(**sizes, rank=q, epoch_begin=0) for q in range(world_size)]
    keys = sorted(key for rank in ranks for step in rank for micro_batch in step for key in micro_batch)
    assert keys == [(0, i) for i in range(steps * config.micro_bsz * world_size)]
    assert len(keys) - samples.samples_per_pass < config.micro_bsz * world_size
    return [samples.sample(7, *key) for key in keys[: samples.samples_per_pass]]


def pairs_trained(rows) -> Counter:
    """Count (input, target) of all trained targets."""
    return Counter(
        pair
        for row in rows
        for pair in zip(row["input_ids"][row["loss_mask"]], row["targets"][row["loss_mask"]], strict=True)
    )


@EXAMPLES
@given(
    sizes=SIZES, ctx_len=st.integers(1, 50), world_size=st.integers(1, 5), long=st.sampled_from(["truncate", "split"])
)
@pytest.mark.parametrize("dataload", ["pad", "only", "pack"])
def test_an_epoch_predicts_every_token_of_every_document_once(write_pair, dataload, sizes, ctx_len, world_size, long):
    micro_bsz = 1 if dataload == "only" else 3
    config = DataConfig(dataload=dataload, ctx_len=ctx_len, micro_bsz=micro_bsz, long=long)
    documents = numbered(sizes)
    samples = Samples(BinidxReader(write_pair(documents)), config, 65536)
    if long == "truncate":
        documents = [document[: ctx_len + 1] for document in documents]
    expected = Counter(pair for document in documents for pair in itertools.pairwise(document))
    rows = epoch_on(samples, config, world_size)
    assert pairs_trained(rows) == expected
    assert samples.picker.targets == expected.total()
    for row in rows:
        shape = row["input_ids"].shape
        assert all(value.shape == shape for value in row.values())
        trained = int(row["loss_mask"].sum())
        assert shape == ((max(trained, 1),) if dataload == "only" else (ctx_len,))


@EXAMPLES
@given(tokens=st.integers(2, 900), ctx_len=st.integers(1, 30), world_size=st.integers(1, 5))
def test_a_pass_of_the_walk_has_every_window_once(write_pair, tokens, ctx_len, world_size):
    config = DataConfig(dataload="walk", ctx_len=ctx_len, micro_bsz=2)
    samples = Samples(BinidxReader(write_pair([list(range(1, tokens + 1))])), config, 65536)
    rows = epoch_on(samples, config, world_size)
    starts = sorted(int(row["input_ids"][0]) - 1 for row in rows)
    assert starts == list(range(0, len(rows) * ctx_len, ctx_len))
    assert pairs_trained(rows) == Counter((i, i + 1) for i in range(1, min(len(rows) * ctx_len, tokens - 1) + 1))


def test_the_walk_equals_rwkv_lms(write_pair):
    """i = (factor * ii**3) % magic_prime * ctx_len with ii from 1, factor = int(magic_prime * 0.618...)."""
    reader = BinidxReader(write_pair([[1] * 130]))
    picker = make_picker(reader, DataConfig(dataload="walk", ctx_len=4))
    assert picker.samples_per_pass == 29
    assert [picker.spans(0, 0, i)[0][0] for i in range(4)] == [4 * (17 * ii**3 % 29) for ii in (1, 2, 3, 4)]
    assert picker.spans(5, 3, 1) == picker.spans(0, 0, 1) == picker.spans(0, 0, 30)


@pytest.mark.parametrize("dataload", ["get", "walk"])
def test_magic_prime_and_exit_tokens_are_checked(write_pair, dataload):
    reader = BinidxReader(write_pair([[1] * 130]))
    settings = {"dataload": dataload, "ctx_len": 4}
    picker = make_picker(reader, DataConfig(**settings, magic_prime=29, my_exit_tokens=130))
    assert picker.samples_per_pass == 29
    with pytest.raises(ConfigError, match=r"--magic_prime: .*found 23, expected 29, for the 130 tokens .* ctx_len 4"):
        make_picker(reader, DataConfig(**settings, magic_prime=23))
    with pytest.raises(ConfigError, match=r"--my_exit_tokens: .*found 131, expected 130, the number of tokens"):
        make_picker(reader, DataConfig(**settings, my_exit_tokens=131))


def test_exit_tokens_alone_keep_get_random(write_pair):
    reader = BinidxReader(write_pair([[1] * 130]))
    assert make_picker(reader, DataConfig(ctx_len=4, my_exit_tokens=130)).samples_per_pass == 33
    make_picker(reader, DataConfig(ctx_len=4, dataload="pad", my_exit_tokens=5, magic_prime=5))


@pytest.mark.parametrize("split", [False, True])
def test_pieces_have_the_right_sizes(split):
    pieces = Pieces(np.cumsum([0, 1, 2, 5, 6, 9, 0, 10]), 4, split=split)
    spans = [pieces.span(i) for i in range(len(pieces))]
    assert [stop - start for start, stop in spans] == pieces.sizes().tolist()
    expected = [(0, 1), (1, 3), (3, 8), (8, 13), (12, 14), (14, 19), (18, 23), (23, 23), (23, 28), (27, 32), (31, 33)]
    assert spans == (expected if split else [s for s in expected if s not in [(12, 14), (18, 23), (27, 32), (31, 33)]])
    assert pieces.truncated == (0 if split else 3)


def test_a_packed_row_marks_where_documents_begin(write_pair):
    """[1 2 3 4 0] and [5 6 0] in a row of 8 inputs: targets across a boundary and padding are not trained."""
    config = DataConfig(dataload="pack", ctx_len=10)
    row = Samples(BinidxReader(write_pair([[5, 6, 0], [1, 2, 3, 4, 0]])), config, 65536).sample(0, 0, 0)
    assert row["input_ids"].tolist() == [1, 2, 3, 4, 0, 5, 6, 0, 0, 0]
    assert row["targets"].tolist() == [2, 3, 4, 0, 5, 6, 0, 0, 0, 0]
    assert row["loss_mask"].tolist() == [True, True, True, True, False, True, True, False, False, False]
    assert row["starts"].tolist() == [True, False, False, False, False, True, False, False, True, False]
    assert row["starts"].dtype == np.bool_


@pytest.mark.parametrize(("ctx_len", "starts", "trains"), [(8, "10000100", "11110110"), (7, "1000010", "1111011")])
def test_a_full_packed_row(write_pair, ctx_len, starts, trains):
    """The eod of the last document may be an input without a target, or only a target."""
    config = DataConfig(dataload="pack", ctx_len=ctx_len)
    row = Samples(BinidxReader(write_pair([[5, 6, 0], [1, 2, 3, 4, 0]])), config, 65536).sample(0, 0, 0)
    assert row["starts"].tolist() == [flag == "1" for flag in starts]
    assert row["loss_mask"].tolist() == [flag == "1" for flag in trains]


@EXAMPLES
@given(sizes=SIZES, ctx_len=st.integers(1, 50))
def test_starts_are_the_first_tokens_of_documents_and_of_padding(write_pair, sizes, ctx_len):
    documents = numbered(sizes)
    firsts = {document[0] for document in documents} | {0}
    config = DataConfig(dataload="pack", ctx_len=ctx_len)
    samples = Samples(BinidxReader(write_pair(documents)), config, 65536)
    used = []
    for index in range(samples.samples_per_pass):
        row = samples.sample(1, 0, index)
        ids, starts = row["input_ids"], row["starts"]
        previous = np.concatenate([[-1], ids[:-1]])
        assert starts.tolist() == [i in firsts and not i == p == 0 for i, p in zip(ids, previous, strict=True)]
        used.append((ids > 0).mean())
    assert 1 - samples.picker.padding == pytest.approx(np.mean(used))


DATALOADS = ["get", "walk", "pad", "only", "pack"]
TINY = [[[8, 0]], [[8, 9, 10, 0]], [[8, 0], [9], [10, 11, 0]]]
PAIRWISE = [(d, ctx_len, TINY[(i + j) % 3]) for i, d in enumerate(DATALOADS) for j, ctx_len in enumerate((1, 2, 64))]


@pytest.mark.parametrize(("dataload", "ctx_len", "documents"), PAIRWISE)
def test_tiny_data(write_pair, dataload, ctx_len, documents):
    config = DataConfig(dataload=dataload, ctx_len=ctx_len, micro_bsz=1, long="split")
    samples = Samples(BinidxReader(write_pair(documents)), config, 65536)
    rows = [samples.sample(0, 0, i) for i in range(3 * samples.samples_per_pass)]
    assert sum(row["loss_mask"].sum() for row in rows) >= 3 * (dataload not in ("get", "walk"))
    for row in rows:
        pairs = pairs_trained([row])
        stream = [token for document in documents for token in document]
        assert all(pair in itertools.pairwise(stream) for pair in pairs)


@pytest.mark.parametrize("dataload", ["pad", "only", "pack"])
def test_only_documents_of_one_token_is_an_error(write_pair, dataload):
    with pytest.raises(DataError, match="nothing to predict"):
        Samples(BinidxReader(write_pair([[0], [5]])), DataConfig(dataload=dataload, micro_bsz=1), 65536)
