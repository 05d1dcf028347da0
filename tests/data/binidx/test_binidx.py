from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter, finalize_together
from rwkv_peft.errors import DataError
from tests.data.pairs import IdsOnly, index_bytes, write_files

DOCUMENTS = [[1, 2, 3, 0], [65535, 0], [7, 0, 7, 7, 0]]


def documents_of(reader: BinidxReader) -> list[list[int]]:
    return [reader.document(i).tolist() for i in range(len(reader))]


@pytest.mark.parametrize(("vocab_size", "code", "letter", "itemsize"), [(65536, 8, "H", 2), (65537, 4, "i", 4)])
def test_the_written_files_byte_for_byte(write_pair, vocab_size, code, letter, itemsize):
    prefix = write_pair(DOCUMENTS, vocab_size)
    flat = [token for ids in DOCUMENTS for token in ids]
    assert Path(prefix + ".bin").read_bytes() == struct.pack(f"<{len(flat)}{letter}", *flat)
    assert Path(prefix + ".idx").read_bytes() == index_bytes([4, 2, 5], code=code, itemsize=itemsize)


@pytest.mark.parametrize(
    ("code", "letter", "dtype"),
    [(1, "B", "u1"), (2, "b", "i1"), (3, "h", "i2"), (4, "i", "i4"), (5, "q", "i8"), (8, "H", "u2")],
)
def test_reads_every_integer_dtype(tmp_path, code, letter, dtype):
    index = index_bytes([2, 1], code=code, itemsize=np.dtype(dtype).itemsize)
    reader = BinidxReader(write_files(tmp_path / "pair", index, struct.pack(f"<3{letter}", 5, 0, 100)))
    assert documents_of(reader) == [[5, 0], [100]]
    assert reader.dtype == np.dtype(dtype)
    assert reader.meta is None


@pytest.mark.parametrize(
    ("marks", "documents"),
    [
        ([0, 2, 3], [[1, 2, 3], [4]]),
        ([0, 0, 3], [[], [1, 2, 3, 4]]),
        ([0], [[1], [2, 3], [4]]),
        ([], [[1], [2, 3], [4]]),
    ],
)
def test_marks_group_items_into_documents(tmp_path, marks, documents):
    index = index_bytes([1, 2, 1], marks=marks)
    assert (
        documents_of(BinidxReader(write_files(tmp_path / "pair", index, struct.pack("<4H", 1, 2, 3, 4)))) == documents
    )


@settings(max_examples=50)
@given(documents=st.lists(st.lists(st.integers(0, 65535)), min_size=1).filter(any), wide=st.booleans())
def test_round_trip(documents, wide):
    """The reader returns what was written, and the files equal those of Megatron's writer."""
    code, letter, itemsize = (4, "i", 4) if wide else (8, "H", 2)
    flat = [token for ids in documents for token in ids]
    with tempfile.TemporaryDirectory() as folder:
        with BinidxWriter(f"{folder}/pair", IdsOnly(10**6 if wide else 65536)) as writer:
            for ids in documents:
                writer.add_document(ids)
        reader = BinidxReader(f"{folder}/pair")
        assert documents_of(reader) == documents
        assert reader.sizes.tolist() == [len(ids) for ids in documents]
        assert reader.tokens.tolist() == flat
        assert Path(f"{folder}/pair.bin").read_bytes() == struct.pack(f"<{len(flat)}{letter}", *flat)
        index = index_bytes([len(ids) for ids in documents], code=code, itemsize=itemsize)
        assert Path(f"{folder}/pair.idx").read_bytes() == index


def test_writer_never_wraps_an_id(tmp_path):
    with pytest.raises(OverflowError), BinidxWriter(tmp_path / "pair", IdsOnly()) as writer:
        writer.add_document(np.array([65536]))


def test_the_sidecar_describes_the_pair(write_pair):
    prefix = write_pair(DOCUMENTS, vocab_size=300)
    meta = BinidxReader(prefix).meta
    assert (meta.documents, meta.tokens, meta.vocab_size, meta.eod, meta.tokenizer_spec) == (3, 11, 300, 0, "ids")
    assert meta.tokenizer == IdsOnly().identity


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx", "_text_document", "_text_document.bin"])
def test_suffixes_are_accepted(write_pair, suffix):
    assert BinidxReader(write_pair(DOCUMENTS) + suffix).tokens[0] == 1


def test_a_name_that_really_ends_in_text_document_comes_first(write_pair):
    write_pair(DOCUMENTS, name="chat")
    prefix = write_pair([[9, 0]], name="chat_text_document")
    assert documents_of(BinidxReader(prefix)) == [[9, 0]]


@pytest.mark.parametrize("i", [-1, 3])
def test_document_out_of_range(write_pair, i):
    with pytest.raises(IndexError):
        BinidxReader(write_pair(DOCUMENTS)).document(i)


BAD_INDEXES = {
    "cut header": (b"MMIDIDX", "incomplete"),
    "magic": (index_bytes([1, 3], magic=b"TNTIDX\x00\x00\x00"), "not a binidx index"),
    "version": (index_bytes([1, 3], version=2), "unsupported format version"),
    "dtype": (index_bytes([1, 3], code=77), "does not contain token ids; found dtype code 77"),
    "float": (index_bytes([1, 3], code=6), "does not contain token ids; found float32"),
    "no items": (index_bytes([]), "contains no documents"),
    "absurd count": (index_bytes([1, 3], items=2**62), f"wrong size for {2**62} items"),
    "cut": (index_bytes([1, 3])[:-1], "wrong size for 2 items and 3 document marks"),
    "longer": (index_bytes([1, 3]) + b"\0", "wrong size for 2 items and 3 document marks"),
    "negative size": (index_bytes([-1, 5]), "negative length of item 0"),
    "pointer": (index_bytes([1, 3], pointers=[0, 4]), "wrong offset of item 1; found 4, expected 2"),
    "marks fall": (index_bytes([1, 3], marks=[0, 2, 1, 2]), "invalid document marks"),
    "marks short": (index_bytes([1, 3], marks=[0, 1]), "invalid document marks; found 0, 1, expected ascending"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_a_clear_error(tmp_path, case):
    index, message = BAD_INDEXES[case]
    prefix = write_files(tmp_path / "pair", index, struct.pack("<4H", 1, 2, 3, 4))
    with pytest.raises(DataError) as caught:
        BinidxReader(prefix)
    assert message in str(caught.value)
    assert f"{prefix}.idx: " in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (b"", "is empty"),
        (b"1234567", "wrong size for its .idx, which lists 4 tokens of uint16; found 7 bytes, expected 8"),
        (b"1234567890", "found 10 bytes, expected 8"),
    ],
)
def test_bad_bin_is_a_clear_error(tmp_path, tokens, message):
    prefix = write_files(tmp_path / "pair", index_bytes([1, 3]), tokens)
    with pytest.raises(DataError) as caught:
        BinidxReader(prefix)
    assert message in str(caught.value)
    assert f"{prefix}.bin: " in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_of_the_pair_is_reported(write_pair, suffix):
    prefix = write_pair(DOCUMENTS)
    Path(prefix + suffix).unlink()
    with pytest.raises(DataError, match=rf"pair\{suffix}: no such file"):
        BinidxReader(prefix)


def test_folder_in_place_of_a_file(write_pair):
    prefix = write_pair(DOCUMENTS)
    Path(prefix + ".idx").unlink()
    Path(prefix + ".idx").mkdir()
    with pytest.raises(DataError, match=r"pair\.idx: cannot be read"):
        BinidxReader(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda meta: meta | {"tokens": 12},
            "found 3 documents and 12 tokens, expected 3 and 11",
        ),
        (lambda meta: meta | {"format_version": 9}, "unsupported format version; found 9, expected 1 to 2"),
        (lambda meta: meta | {"format_version": 0}, "unsupported format version"),
        (lambda meta: meta | {"mask": 1}, "damaged; found mask is 1, expected true or false"),
        (lambda meta: meta | {"held_out": "no"}, "damaged; found held_out is 'no', expected true or false"),
        (lambda meta: {key: meta[key] for key in meta if key != "mask"}, "damaged; found no key 'mask'"),
        (lambda meta: meta | {"vocab_size": -300}, "damaged; found eod 0 is not in a vocabulary"),
        (lambda meta: meta | {"tokenizer_spec": "\ud800"}, "damaged; found 'utf-8' codec can't encode"),
        (lambda meta: meta | {"tokenizer": {"name": "x"}}, "damaged; found no key 'sha256'"),
        (lambda meta: meta | {"vocab_size": float("inf")}, "damaged"),
        (lambda meta: [meta], "damaged"),
    ],
)
def test_bad_sidecar_is_a_clear_error(write_pair, change, message):
    path = Path(write_pair(DOCUMENTS) + ".meta.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError) as caught:
        BinidxReader(path.with_name("pair"))
    assert message in str(caught.value)
    assert f"{path}: " in str(caught.value)


def files_of(prefix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()}


def test_interrupted_writer_leaves_the_old_pair(write_pair):
    prefix = write_pair(DOCUMENTS)
    before = files_of(prefix)
    writer = BinidxWriter(prefix, IdsOnly())
    writer.add_document([1] * 100_000)
    assert files_of(prefix).items() > before.items()  # the writer has started, and the old pair still exists
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert files_of(prefix) == before


@pytest.mark.parametrize("last_rename", [0, 1, 2])
def test_writer_that_fails_between_renames_leaves_no_readable_mixture(write_pair, monkeypatch, last_rename):
    prefix = write_pair(DOCUMENTS)
    renames = []
    rename = os.replace

    def fail_at_last(path: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) > last_rename:
            raise OSError("disk gone")
        rename(path, target)

    monkeypatch.setattr(os, "replace", fail_at_last)
    with pytest.raises(OSError, match="disk gone"):
        write_pair([[9, 0]])
    with pytest.raises(DataError, match=r"pair\.idx: no such file"):
        BinidxReader(prefix)
    assert not list(Path(prefix).parent.glob("*.tmp"))
    monkeypatch.undo()
    assert documents_of(BinidxReader(write_pair([[9, 0]]))) == [[9, 0]]


def test_failure_before_the_renames_leaves_the_old_pair(write_pair, monkeypatch):
    prefix = write_pair(DOCUMENTS)
    before = files_of(prefix)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BinidxWriter, "_index_bytes", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_pair([[9, 0]])
    assert files_of(prefix) == before


def test_the_mask_is_written_with_the_tokens(tmp_path):
    prefix = str(tmp_path / "pair")
    with BinidxWriter(prefix, IdsOnly()) as writer:
        writer.add_document([1, 2, 0])  # before anything says that there is a mask: trains everywhere
        writer.add_document([3, 4, 5, 0], [0, 0, 1, 1])
        writer.add_document([6, 0])
    assert Path(prefix + ".mask.bin").read_bytes() == bytes([1, 1, 1, 0, 0, 1, 1, 1, 1])
    assert documents_of(BinidxReader(prefix)) == [[1, 2, 0], [3, 4, 5, 0], [6, 0]]
    assert BinidxReader(prefix).meta.mask is True
    assert BinidxReader(prefix).meta.format_version == 2


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_mask_is_deleted_with_its_pair(tmp_path, with_mask):
    prefix = str(tmp_path / "pair")
    with BinidxWriter(prefix, IdsOnly(), with_mask=True) as writer:
        writer.add_document([1, 2, 3, 0])
    with BinidxWriter(prefix, IdsOnly(), with_mask=with_mask) as writer:
        writer.add_document([1, 0])
    assert Path(prefix + ".mask.bin").exists() == with_mask
    assert json.loads(Path(prefix + ".meta.json").read_text())["mask"] is with_mask
    assert not with_mask or Path(prefix + ".mask.bin").read_bytes() == b"\1\1"


@pytest.mark.parametrize("mask", [[1], [1, 2, 1]])
def test_the_writer_refuses_an_invalid_mask(tmp_path, mask):
    with pytest.raises(ValueError, match="mask"), BinidxWriter(tmp_path / "pair", IdsOnly()) as writer:
        writer.add_document([1, 2, 0], mask)
    assert list(tmp_path.iterdir()) == []


def test_sidecars_of_version_1_are_read(write_pair):
    path = Path(write_pair(DOCUMENTS) + ".meta.json")
    old = json.loads(path.read_text()) | {"format_version": 1}
    del old["mask"]
    path.write_text(json.dumps(old))
    assert BinidxReader(path.with_name("pair")).meta.mask is False


def test_a_document_in_pieces_and_a_dropped_one(tmp_path):
    prefix = str(tmp_path / "pair")
    with BinidxWriter(prefix, IdsOnly(), with_mask=True) as writer:
        writer.add_encoded(struct.pack("<4H", 1, 0, 2, 3), (2, 2), b"\1\1\0\1", last_is_partial=True)
        writer.add_encoded(struct.pack("<3H", 4, 0, 5), (2, 1), last_is_partial=True)
        assert writer.drop_partial() == 1
        assert writer.drop_partial() == 0
        writer.add_encoded(struct.pack("<1H", 6), (1,), last_is_partial=False)
    assert documents_of(BinidxReader(prefix)) == [[1, 0], [2, 3, 4, 0], [6]]
    assert Path(prefix + ".mask.bin").read_bytes() == b"\1\1\0\1\1\1\1"


def test_pairs_that_belong_together_appear_together(tmp_path, write_pair, monkeypatch):
    """If the writer fails in between, no mixture of old and new pairs can be read."""
    for name in ("a", "b"):
        write_pair(DOCUMENTS, name=name)
    writers = [BinidxWriter(tmp_path / name, IdsOnly()) for name in ("a", "b")]
    for writer in writers:
        writer.add_document([9, 0])
    monkeypatch.setattr(writers[1], "replace_old_pair", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finalize_together(writers)
    assert documents_of(BinidxReader(tmp_path / "a")) == [[9, 0]]
    with pytest.raises(DataError, match=r"b\.idx: no such file"):
        BinidxReader(tmp_path / "b")
    assert not list(tmp_path.glob("*.tmp"))
