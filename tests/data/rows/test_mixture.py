from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.rows.mixture import MixedSamples
from rwkv_peft.data.rows.sampling import Samples, make_plan
from rwkv_peft.data.training_data import open_data
from rwkv_peft.errors import ConfigError, DataError


@pytest.fixture
def pairs(write_pair) -> tuple[str, str]:
    """Write 20 documents that begin with 1..20, and 5 that begin with 101..105."""
    few = [[i, 7, 0] for i in range(101, 106)]
    return write_pair([[i, 7, 0] for i in range(1, 21)], name="many"), write_pair(few, name="few")


def open_pairs(pairs, shares=(None, None), **settings):
    words = [path if share is None else f"{path}:{share}" for path, share in zip(pairs, shares, strict=True)]
    config = DataConfig(**{"data_file": tuple(words), "dataload": "pad", "ctx_len": 4} | settings)
    return open_data(config, 65536).samples


def first_tokens(source, indices: range, seed: int = 3, epoch: int = 0) -> list[int]:
    return [int(source.sample(seed, epoch, i)["input_ids"][0]) for i in indices]


def test_one_pair_needs_no_mixing(pairs):
    assert isinstance(open_data(DataConfig(data_file=pairs[0])).samples, Samples)
    shared = open_data(DataConfig(data_file=(f"{pairs[0]}:0.5",))).samples
    assert isinstance(shared, Samples)


def test_shares_hold_from_the_start(pairs):
    source = open_pairs(pairs, (0.7, 0.3))
    tokens = first_tokens(source, range(1000))
    for rows in (10, 50, 100, 333, 1000):
        few = sum(token > 100 for token in tokens[:rows])
        assert abs(few - 0.3 * rows) <= 2
    assert [part.share for part in source.parts] == [0.7, 0.3]


def test_no_row_of_a_pair_is_repeated_before_all_its_rows_are_used(pairs):
    tokens = first_tokens(open_pairs(pairs, (1, 2)), range(300))
    many, few = ([token for token in tokens if (token > 100) == large] for large in (False, True))
    for rows, documents in ((many, range(1, 21)), (few, range(101, 106))):
        rounds = [rows[i : i + len(documents)] for i in range(0, len(rows) - len(documents), len(documents))]
        assert len(rounds) > 3
        assert all(sorted(each) == list(documents) for each in rounds)
        assert len({tuple(each) for each in rounds}) > 1


def test_a_pass_ends_when_all_rows_of_every_pair_are_used(pairs):
    """With shares 1:1, the 20 documents need 40 rows, in which the 5 documents come four times."""
    source = open_pairs(pairs, (0.5, 0.5))
    assert source.samples_per_pass == 40
    assert Counter(first_tokens(source, range(40))) == Counter([*range(1, 21), *(4 * [*range(101, 106)])])


@pytest.mark.parametrize("epoch", [0, 1])
def test_without_shares_a_pass_has_every_row_once(pairs, epoch):
    source = open_pairs(pairs)
    assert source.samples_per_pass == 25
    assert sorted(first_tokens(source, range(25), epoch=epoch)) == [*range(1, 21), *range(101, 106)]
    assert sorted(first_tokens(source, range(25, 50), epoch=epoch)) == [*range(1, 21), *range(101, 106)]


class Rows:
    """Replaces `Samples` of a pair with a number of rows."""

    def __init__(self, samples_per_pass: int) -> None:
        self.samples_per_pass = samples_per_pass


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 1)), min_size=2, max_size=4),
    st.booleans(), st.integers(0, 5), st.integers(0, 3),
)  # fmt: skip
def test_locate_is_a_pure_function_that_uses_each_row_in_turn(parts, weighted, seed, epoch):
    sizes, weights = zip(*parts, strict=True)
    pairs, weights = [Rows(size) for size in sizes], weights if weighted else [None] * len(sizes)
    mixed = MixedSamples(pairs, weights)
    indices = range(mixed.samples_per_pass)
    places = [mixed.locate(seed, epoch, i) for i in indices]
    other = MixedSamples(pairs, weights)
    assert [other.locate(seed, epoch, i) for i in reversed(indices)] == places[::-1]
    counts = [0] * len(sizes)
    for part, number in places:
        assert number == counts[part]
        counts[part] += 1
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    if weighted:  # and no later than need be
        shares = np.array(weights) / sum(weights)
        most = max(size / max(share - 0.0005, 0.001) for size, share in zip(sizes, shares, strict=True))
        assert len(indices) <= most * 1.02 + len(sizes) + 1


def test_the_mix_depends_on_seed_and_epoch(pairs):
    source = open_pairs(pairs, (0.7, 0.3))
    orders = {tuple(source.locate(seed, epoch, i)[0] for i in range(40)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_pairs_of_equal_size_have_different_orders(write_pair):
    pairs = [write_pair([[i, 7, 0] for i in range(1, 21)], name=name) for name in ("a", "b")]
    source = open_pairs(pairs)
    a, b = ([source.parts[k].samples.sample(3, 0, i)["input_ids"][0] for i in range(20)] for k in (0, 1))
    assert a != b


def test_plan_of_several_pairs(pairs):
    source = open_pairs(pairs, (0.5, 0.5), micro_bsz=3)
    plan = make_plan(source, DataConfig(micro_bsz=3), world_size=2)
    assert (plan.documents, plan.tokens, plan.samples_per_pass, plan.steps_per_epoch) == (25, 75, 40, 7)
    assert (plan.targets, plan.masks, plan.padding) == (50, ("pad", "pad"), pytest.approx(0.5))


@pytest.mark.parametrize(
    ("words", "sources"),
    [
        (("a",), (("a", None),)),
        (("a:0.7", "b:3"), (("a", 0.7), ("b", 3.0))),
        (("C:/data/chat",), (("C:/data/chat", None),)),
        (("C:/data/chat:2",), (("C:/data/chat", 2.0),)),
        ((":3",), ((":3", None),)),
    ],
)
def test_shares_in_data_file(words, sources):
    assert DataConfig(data_file=words).sources == sources


@pytest.mark.parametrize("word", ["a:0", "a:-1", "a:nan", "a:inf"])
def test_a_share_is_a_number_above_0(word):
    with pytest.raises(ConfigError, match=r"--data_file: .*expected a share above 0"):
        DataConfig(data_file=(word, "b:1"))


def test_shares_are_for_all_or_none():
    with pytest.raises(
        ConfigError, match=r"--data_file: only some have a share; found a:0\.3 b, expected a share for each"
    ):
        DataConfig(data_file=("a:0.3", "b"))


def test_pairs_of_two_tokenizers_are_an_error(pairs):
    path = Path(pairs[1] + ".meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": {"name": "other", "sha256": "1" * 64}}))
    with pytest.raises(DataError, match="few: made with a different tokenizer than the first --data_file; found other"):
        open_pairs(pairs)


def test_the_order_never_changes(pairs):
    """A run of an older version must resume with the same data."""
    mixed = open_pairs(pairs, (0.7, 0.3))
    assert first_tokens(mixed, range(12), seed=42, epoch=1) == [5, 103, 11, 13, 104, 14, 10, 105, 6, 17, 102, 4]
