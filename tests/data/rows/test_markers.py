from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.rows import markers
from rwkv_peft.data.rows.markers import find_sequences, ranges_between, spellings
from rwkv_peft.data.tokenizer import load_tokenizer

tokenizer_of = cache(load_tokenizer)
assistant_in = cache(lambda spec: spellings(tokenizer_of(spec), "Assistant:"))


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 2), max_size=40), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3)
)
def test_find_sequences_finds_every_occurrence(tokens, sequences):
    sequences = sorted({tuple(sequence) for sequence in sequences})
    naive = [
        [i, i + len(sequence)]
        for i in range(len(tokens))
        for sequence in sequences
        if tuple(tokens[i : i + len(sequence)]) == sequence
    ]
    assert find_sequences(np.array(tokens, dtype=np.uint16), sequences).tolist() == sorted(naive)


def test_find_sequences_across_chunks(monkeypatch):
    monkeypatch.setattr(markers, "_CHUNK", 4)
    assert find_sequences(np.array([0, 0, 0, 7, 8, 9, 0, 7, 8], np.uint16), [(7, 8, 9), (7, 8)]).tolist() == [
        [3, 5],
        [3, 6],
        [7, 9],
    ]


def between_step_by_step(tokens: list[int], bounds: list[int]) -> list[bool]:
    """Token 2 opens a range; token 1 or the end of a document closes it."""
    trains, on = [], False
    for i, token in enumerate(tokens):
        if i in bounds:
            on = False
        on = on and token != 1
        trains.append(on and token != 2)
        on = on or token == 2
    return trains


@settings(max_examples=300)
@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=5))
def test_ranges_between_equals_a_token_by_token_search(documents):
    tokens = [token for document in documents for token in document]
    bounds = np.cumsum([0, *(len(document) for document in documents)])
    stream = np.array(tokens, np.uint16)
    ranges = ranges_between(find_sequences(stream, [(2,)]), find_sequences(stream, [(1,)]), bounds)
    trains = np.zeros(len(tokens), bool)
    for start, stop in ranges:
        assert start < stop
        assert not trains[start:stop].any()
        trains[start:stop] = True
    # A second opening marker inside an answer is a part of the answer.
    expected = between_step_by_step(tokens, bounds.tolist())
    inside = [i for i, token in enumerate(tokens) if token == 2 and trains[i]]
    assert [i for i in range(len(tokens)) if trains[i] != expected[i]] == inside


def test_a_marker_across_the_end_of_a_document_is_ignored():
    stream, bounds = np.array([5, 7, 8, 9, 7, 8, 3], np.uint16), np.array([0, 2, 7])
    assert ranges_between(find_sequences(stream, [(7, 8)]), find_sequences(stream, [(4,)]), bounds).tolist() == [[6, 7]]
    assert ranges_between(find_sequences(stream, [(5,)]), find_sequences(stream, [(7, 8)]), bounds).tolist() == [[1, 2]]


BEFORE = ["", "\n\n", " ", ".", "(", "“\n"]
AFTER = ["", " hi", "\nhi", "\n\n", '"hi', "**hi", "://", "hi", "你好", "```\n", "5"]


@pytest.mark.parametrize("spec", ["world", "bytes"])
@pytest.mark.parametrize(("before", "after"), [*((b, " hi") for b in BEFORE), *(("\n\n", a) for a in AFTER), ("", "")])
def test_spellings_include_tokens_shared_with_neighbors(spec, before, after):
    """The found tokens are the fewest whose text contains the marker."""
    tokenizer = tokenizer_of(spec)
    ids = tokenizer.encode(f"x{before}Assistant:{after}") if before else tokenizer.encode(f"Assistant:{after}")
    matches = find_sequences(np.array(ids), assistant_in(spec))
    start, stop = matches[-1]
    assert "Assistant:" in tokenizer.decode(ids[start:stop])
    assert "Assistant:" not in tokenizer.decode(ids[start + 1 : stop])
    assert "Assistant:" not in tokenizer.decode(ids[start : stop - 1])


def test_a_marker_inside_a_word_is_ignored():
    world = tokenizer_of("world")
    assert len(find_sequences(np.array(world.encode("getUser: none")), spellings(world, "User:"))) == 0
