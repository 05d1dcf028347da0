from __future__ import annotations

import re
import struct
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx import mask_file
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.data.inspect import summary as inspection
from rwkv_peft.data.inspect.summary import Vocabulary, batches, check, find_vocabulary, histogram, parse_documents
from rwkv_peft.data.inspect.token_view import TokenView, escape_controls
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.data.tokenizer import BytesTokenizer, WorldTokenizer
from rwkv_peft.data.training_data import open_data
from rwkv_peft.errors import ConfigError, DataError
from tests.data.pairs import index_bytes, write_files, write_mask

BYTES = BytesTokenizer()
WORLD = WorldTokenizer()
PLAIN = TokenView(BYTES)


@pytest.fixture(scope="module", autouse=True)
def _vocabulary_is_read():
    """Load it before the tests, because hypothesis would report the first example as slow."""
    WORLD.decode([])


@pytest.fixture
def chat(tmp_path) -> str:
    """Write two documents with the bytes tokenizer and a mask that trains the answers and their eod."""
    texts = ("Q: 2+2?\nA:", " 4"), ("Q: 3?\nA:", " 3")
    mask = b""
    with BinidxWriter(tmp_path / "chat", BYTES) as writer:
        for question, answer in texts:
            writer.add_document([*BYTES.encode(question + answer), 0])
            mask += bytes(len(question)) + b"\1" * (len(answer) + 1)
    return write_mask(str(tmp_path / "chat"), mask)


def marks(length: int, *trained: int) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    mask[list(trained)] = True
    return mask


def shown(view: TokenView, text: str, *trained: int, **options: object) -> str:
    ids = np.array(BYTES.encode(text))
    return view.show(ids, marks(len(ids), *trained), **options)


# ------------------------------------------------------------------------------------------- tokens


def test_trained_runs_are_in_brackets():
    assert shown(PLAIN, "abcdef", 1, 2, 5) == "  a⟦bc⟧de⟦f⟧"
    assert shown(PLAIN, "abc") == "  abc"
    assert PLAIN.show(np.array([98, 99])) == "  ab"


def test_lines_are_colored_separately_and_a_trained_newline_is_visible():
    view = TokenView(BYTES, color=True)
    assert shown(view, "a b\nc", 1, 2, 3, 4) == "  a\x1b[30;42m b↵\x1b[0m\n  \x1b[30;42mc\x1b[0m"
    assert shown(view, "a\nb", 0, 1) == "  \x1b[30;42ma↵\x1b[0m\n  b"
    assert shown(view, "a\nb", 0, 2) == "  \x1b[30;42ma\x1b[0m\n  \x1b[30;42mb\x1b[0m"


def test_ends_of_documents_are_shown_and_highlighted():
    assert PLAIN.show(np.array([98, 0, 99, 0]), marks(4, 1, 2)) == "  a⟦<end>b⟧<end>"


def test_long_documents_are_shown_in_part():
    view = TokenView(BYTES, limit=3)
    assert shown(view, "abcdef", 2, 3) == "  ab⟦c⟧\n  ... 3 more tokens"
    assert shown(view, "abc") == "  abc"
    assert shown(TokenView(BYTES, limit=None), "x" * 5000) == "  " + "x" * 5000


def test_boundaries_show_tokens_and_parts_of_characters():
    ids = np.array([*WORLD.encode("hello world"), 229, 0])
    assert TokenView(WORLD, boundaries=True).show(ids, marks(4, 1, 2)) == "  hello│⟦ world│<229>⟧│<end>"


def test_without_a_tokenizer_ids_are_shown():
    view = TokenView(None)
    assert view.show(np.array([5, 6, 7, -1], dtype=np.int32), marks(4, 1, 2)) == "  5 ⟦6 7⟧ -1"


def test_state_resets_are_shown():
    assert shown(PLAIN, "abcd", 2, 3, starts=[0, 3]) == "  <reset>ab⟦c⟧<reset>⟦d⟧"


def test_control_characters_never_reach_the_terminal():
    assert escape_controls("\u2067\x7f\u2028") == "\\u2067\\x7f\\u2028"
    assert escape_controls("a\x1b[2J\r\x9b\u202eb\tc\n你👩\u200d👧") == "a\\x1b[2J\\r\\x9b\\u202eb\tc\n你👩\u200d👧"
    assert "\x1b" not in shown(PLAIN, "\x1b[31m")


VIEWS = [TokenView(tokenizer, boundaries=strokes) for tokenizer in (WORLD, BYTES, None) for strokes in (False, True)]


@given(
    rows=st.lists(st.tuples(st.integers(-(2**40), 2**40) | st.integers(0, 70000), st.booleans())),
    starts=st.lists(st.integers(-1, 9)),
)
def test_any_ids_can_be_shown_and_color_shows_the_same(rows, starts):
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    trained = np.array([row[1] for row in rows], dtype=bool)
    for view in VIEWS:
        text = view.show(ids, trained, starts)
        assert escape_controls(text) == text
        colored = TokenView(view.tokenizer, True, view.boundaries).show(ids, trained, starts)
        assert without_marks(colored) == without_marks(text)


def without_marks(text: str) -> str:
    """Also for spaces at the end of a line, and for tokens whose text contains the brackets."""
    return re.sub(r"\x1b\[[0-9;]*m|[↵⟦⟧]|\s", "", text)


# --------------------------------------------------------------------------------------------- pair


def test_summary_of_a_pair_with_a_mask(chat):
    reader = BinidxReader(chat)
    lines = inspection.summary(reader, find_vocabulary(reader, None)).splitlines()
    size = Path(chat + ".meta.json").stat().st_size
    assert lines == [
        f"pair       {chat}",
        f"bytes      .bin 48  .idx 82  .meta.json {size}  .mask.bin 24",
        "documents  2",
        "tokens     24 of uint16",
        f"tokenizer  bytes (bytes, sha256 {BYTES.identity['sha256'][:12]}), 257 ids, end-of-document id 0",
        "loss mask  6 of 24 tokens are in the loss (25.0%)",
        "lengths    shortest 11, 10th percentile 11, median 11, 90th percentile 13, 99th percentile 13, longest 13",
        "           mean 12.0 tokens; number of documents by length:",
        f"  11  1  {'#' * 50}",
        "  12  0",
        f"  13  1  {'#' * 50}",
    ]


def test_documents_without_a_trained_token_are_counted(write_pair, monkeypatch):
    prefix = write_mask(write_pair([[1], [], [2, 3], [], [4, 5], []]), bytes([0, 1, 0, 0, 0]))
    monkeypatch.setattr(inspection, "_CHUNK", 2)
    reader = BinidxReader(prefix)
    text = inspection.summary(reader, Vocabulary(None, None, None, "no text"))
    assert "loss mask  1 of 5 tokens are in the loss (20.0%); 2 documents without a token in the loss\n" in text
    assert "note: no text\n" in text


def test_a_pair_without_a_sidecar_has_a_note(tmp_path):
    reader = BinidxReader(write_files(tmp_path / "pair", index_bytes([2]), struct.pack("<2H", 98, 0)))
    vocabulary = find_vocabulary(reader, None)
    assert (vocabulary.tokenizer, vocabulary.size, vocabulary.eod) == (None, None, None)
    assert "--tokenizer" in vocabulary.note
    named = find_vocabulary(reader, "bytes")
    assert (named.tokenizer.spec, named.size, named.eod, named.note) == ("bytes", 257, 0, None)


def test_a_missing_or_different_tokenizer_has_a_note(write_pair, chat):
    gone = find_vocabulary(BinidxReader(write_pair([[1, 0]], vocab_size=300)), None)  # its spec is "ids"
    assert (gone.tokenizer, gone.size, gone.eod) == (None, 300, 0)
    assert "tokenizer ids cannot be read" in gone.note
    assert "world is not the tokenizer of this pair (bytes)" in find_vocabulary(BinidxReader(chat), "world").note
    with pytest.raises(ConfigError, match="--tokenizer"):
        find_vocabulary(BinidxReader(chat), "nonsense")


@given(sizes=st.lists(st.integers(0, 2000) | st.integers(0, 2**31 - 1), min_size=1))
def test_histogram_counts_every_document_once(sizes):
    rows = [re.fullmatch(r" +([\d,]+)(?: to ([\d,]+))?  +([\d,]+)(?:  (#+))?", line) for line in lines_of(sizes)]
    numbers = [[int((text or "-1").replace(",", "")) for text in row.groups()[:3]] for row in rows]
    assert len(numbers) <= 18
    after = -1
    for (first, last, count), row in zip(numbers, rows, strict=True):
        last = max(first, last)
        assert first <= last
        assert after in (-1, first - 1)
        assert count == sum(first <= size <= last for size in sizes)
        assert bool(row[4]) == bool(count)
        after = last
    assert sum(count for _, _, count in numbers) == len(sizes)


def lines_of(sizes: list[int]) -> list[str]:
    return histogram(np.array(sizes, dtype=np.int64)).splitlines()


def test_the_longest_percent_shares_the_last_bar():
    lines = lines_of([10, 10, 11, 11] * 100 + [99999])
    assert lines == [f"            10  200  {'#' * 50}", f"  11 to 99,999  201  {'#' * 50}"]


def test_histogram_bars_are_in_proportion():
    bars = [line.count("#") for line in lines_of([1] * 100 + [2] * 50 + [3] * 3)]
    assert bars == [50, 25, 2]


def test_check_describes_the_tokens(chat, write_pair, monkeypatch):
    monkeypatch.setattr(inspection, "_CHUNK", 3)
    assert check(BinidxReader(chat), 257, 0).splitlines() == [
        "check      index, sizes and .meta.json agree",
        "           ids from 0 to 82: vocabulary of 257",
        "           mask is valid: one 0 or 1 for each token",
        "           2 of 2 documents end with 0, which occurs 0 times elsewhere",
    ]
    text = check(BinidxReader(write_pair([[9, 0, 0], [], [1, 0, 8]])), None, 0)
    assert "ids from 0 to 9: vocabulary size unknown" in text
    assert "1 empty document" in text
    assert "1 of 3 documents end with 0, which occurs 2 times elsewhere" in text


def test_check_finds_damage_that_opening_does_not(chat, monkeypatch):
    with pytest.raises(DataError, match="found 82 at token 0 of document 0, expected 0 to 81"):
        check(BinidxReader(chat), 82, 0)
    monkeypatch.setattr(mask_file, "CHECK_ALL_UP_TO", 0)
    mask = Path(chat + ".mask.bin")
    mask.write_bytes(mask.read_bytes()[:-1] + b"\7")
    with pytest.raises(DataError, match=r"chat\.mask\.bin: invalid value at token 23; found 7"):
        check(BinidxReader(chat), 257, 0)


def test_negative_ids_are_an_error_with_any_vocabulary(tmp_path):
    index = index_bytes([3], code=4, itemsize=4)
    reader = BinidxReader(write_files(tmp_path / "pair", index, struct.pack("<3i", 5, -7, 0)))
    with pytest.raises(DataError, match="found -7 at token 1 of document 0"):
        check(reader, None, None)
    Path(reader.prefix + ".bin").write_bytes(struct.pack("<3i", 5, 2**31 - 1, 0))
    text = check(BinidxReader(reader.prefix), None, None)
    assert text.startswith("check      index and sizes agree\n")
    assert f"ids from 0 to {2**31 - 1}: vocabulary size unknown" in text


def test_documents_are_chosen_by_numbers_and_ranges():
    assert list(parse_documents(["0", "5-7", "3-3"], 8)) == [0, 5, 6, 7, 3]
    assert list(parse_documents([], 8)) == []
    assert list(islice(parse_documents(["1-999999999999"], 10**15), 2)) == [1, 2]


@pytest.mark.parametrize("word", ["8", "7-8", "5-3", "-1", "a", "1-2-3", "1-", "", "9" * 40, "²"])
def test_documents_out_of_range_are_an_error(word):
    with pytest.raises(ConfigError, match="--documents: "):
        parse_documents(["0", word], 8)


def test_a_document_and_its_mask(chat, write_pair):
    text = inspection.show_document(BinidxReader(chat), 1, PLAIN)
    assert text == "document 1: 11 tokens (13 to 23), 3 in the loss\n  Q: 3?\n  A:⟦ 3<end>⟧"
    unmasked = BinidxReader(write_pair([[], [98, 0]]))
    assert inspection.show_document(unmasked, 1, PLAIN) == "document 1: 2 tokens (0 to 1)\n  a<end>"
    assert inspection.show_document(unmasked, 0, PLAIN) == "document 0: empty"


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("dataload", ["get", "pad"])
def test_the_shown_batches_equal_those_of_training(write_pair, dataload):
    prefix = write_pair([[i + 1, *range(i), 0] for i in range(23)])
    settings = {"data_file": prefix, "ctx_len": 6, "micro_bsz": 4, "epoch_begin": 2, "random_seed": 7}
    config = DataConfig(dataload=dataload, epoch_steps=5, **settings)
    module = BinidxDataModule(open_data(config, vocab_size=100), micro_batches_per_step=1)
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0)
    rows = list(batches(Samples(BinidxReader(prefix), config, 100), config, 3))
    assert [row[:2] for row in rows] == [(batch, row) for batch in range(3) for row in range(4)]
    trained = [micro_batch for (micro_batch,) in module.train_dataloader()]
    for batch, row, sample in rows:
        for key, value in sample.items():
            assert np.array_equal(value, trained[batch][key][row].numpy()), key
    assert len(list(batches(Samples(BinidxReader(prefix), config, 100), config, 9))) == 5 * 4


def row_of(ids: list[int], mask: list[int], **more: object) -> str:
    sample = {"input_ids": np.array(ids[:-1]), "targets": np.array(ids[1:]), "loss_mask": np.array(mask, dtype=bool)}
    return inspection.show_row(1, 3, sample | more, PLAIN)


def test_a_row_shows_which_targets_are_trained():
    assert row_of([98, 99, 100, 0], [0, 1, 1]) == "batch 1, row 3: 2 of 3 targets are in the loss\n  ab⟦c<end>⟧"
    assert row_of([98, 99, 0, 0], [1, 0, 0]) == (
        "batch 1, row 3: 1 of 3 targets are in the loss\n  a⟦b⟧\n  ... and 2 zeros, not in the loss"
    )
    assert (
        row_of([0, 0, 0], [0, 0])
        == "batch 1, row 3: 0 of 2 targets are in the loss\n  ... and 3 zeros, not in the loss"
    )


@pytest.mark.parametrize("starts", [np.array([False, True, False]), np.array([1])])
def test_a_row_shows_where_the_state_is_reset(starts):
    assert row_of([98, 99, 100, 101], [1, 0, 1], starts=starts).endswith("\n  a<reset>⟦b⟧c⟦d⟧")
