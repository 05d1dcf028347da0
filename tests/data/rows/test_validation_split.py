"""The split into training and validation documents, and reading some documents as a pair of their own."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.data.rows.validation_split import DocumentSubset, training_documents
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.training_data import open_data
from rwkv_peft.errors import DataError
from tests.data.pairs import IdsOnly

TOKENIZER = load_tokenizer("bytes")


def documents(count: int = 60) -> list[list[int]]:
    texts = [f"User: {i * i}?\n\nAssistant: {'yes' * (i % 7)}." if i % 9 else "" for i in range(1, count + 1)]
    return [[*TOKENIZER.encode(text), TOKENIZER.eod] for text in texts]


def write(prefix: Path, contents: list[list[int]], tokenizer=TOKENIZER, with_mask: bool = False) -> BinidxReader:
    with BinidxWriter(prefix, tokenizer) as writer:
        for ids in contents:
            writer.add_document(ids, [i % 2 for i in ids] if with_mask else None)
    return BinidxReader(prefix)


def contents(reader: BinidxReader) -> list[list[int]]:
    return [reader.document(i).tolist() for i in range(len(reader))]


@pytest.mark.parametrize(
    ("dataload", "loss_mask"),
    [
        ("get", "none"),
        ("walk", "qa"),
        ("pad", "file"),
        ("only", "qa"),
        ("pack", "file"),
        ("pack", "qa"),
        ("get", "file"),
    ],
)
def test_rows_of_a_subset_equal_those_of_a_pair_with_its_documents(dataload, loss_mask, tmp_path):
    """The reference is a pair written with exactly these documents."""
    with_mask = loss_mask == "file"
    part = training_documents(write(tmp_path / "all", documents(), with_mask=with_mask), 0.3)
    assert 20 < len(part) < 58
    alone = write(tmp_path / "part", contents(part), with_mask=with_mask)
    micro_bsz = 1 if dataload == "only" else 4
    config = DataConfig(ctx_len=40, dataload=dataload, loss_mask=loss_mask, micro_bsz=micro_bsz)
    ours, theirs = (Samples(reader, config, 257) for reader in (part, alone))
    assert ours.samples_per_pass == theirs.samples_per_pass
    assert ours.mask.untrained_documents == theirs.mask.untrained_documents
    for index in range(ours.samples_per_pass):
        a, b = ours.sample(3, 1, index), theirs.sample(3, 1, index)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_the_split_depends_on_neither_order_nor_storage(tmp_path):
    ids = documents()
    shuffled = random.Random(0).sample(ids, len(ids))
    first = training_documents(write(tmp_path / "a", ids), 0.4)
    second = training_documents(write(tmp_path / "b", [*shuffled, [5, 6, 0]]), 0.4)
    wide = training_documents(write(tmp_path / "c", ids, IdsOnly(vocab_size=2**17)), 0.4)
    for part in (first, second, wide):
        train, validation = ({tuple(content) for content in contents(side)} for side in (part, part.complement()))
        assert not train & validation
        assert {tuple(content) for content in ids} <= train | validation
        assert train - {(5, 6, 0)} == {tuple(content) for content in contents(first)}
    assert wide.dtype != first.dtype


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_about_this_fraction_is_for_validation(fraction, tmp_path):
    reader = write(tmp_path / "many", [[1 + i % 250, 1 + i // 250, 0] for i in range(4000)])
    rest = training_documents(reader, fraction).complement()
    assert len(rest) / 4000 == pytest.approx(fraction, abs=0.03)


def test_positions_in_a_subset(tmp_path):
    reader = write(tmp_path / "pair", [[1, 2, 0], [3, 0], [4, 5, 6, 0], [7, 0]])
    part = DocumentSubset(reader, np.array([True, True, False, True]))
    assert len(part.tokens) == 7
    assert part.tokens[:].tolist() == [1, 2, 0, 3, 0, 7, 0]
    assert part.tokens[4:6].tolist() == [0, 7]
    assert part.tokens[3:3].tolist() == []
    assert part.tokens[np.array([0, 5, 4])].tolist() == [1, 7, 0]
    assert part.tokens[5] == 7
    assert contents(part.complement()) == [[4, 5, 6, 0]]
    assert DocumentSubset(reader, np.ones(4, dtype=bool)).complement() is None


def test_all_documents_for_validation_is_an_error(tmp_path):
    write(tmp_path / "one", [[1, 2, 0]])
    with pytest.raises(
        DataError,
        match=r"--val_fraction: no document is left for training; found 0\.999999, which takes all 1 documents",
    ):
        open_data(DataConfig(data_file=str(tmp_path / "one"), val_fraction=0.999999), 257)


def test_an_id_outside_the_vocabulary_is_reported_by_its_place_in_the_file(tmp_path):
    write(tmp_path / "pair", [[i, 0] for i in range(1, 50)] + [[200, 0]])
    with pytest.raises(DataError, match="found 200 at token 0 of document 49"):
        open_data(DataConfig(data_file=str(tmp_path / "pair"), val_fraction=0.5), 100)
