from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.data.binidx import mask_file
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.errors import DataError
from tests.data.pairs import index_bytes, write_files, write_mask

DOCUMENTS = [[5, 6, 0], [7, 8, 9, 0]]
MASK = bytes([0, 0, 1, 0, 1, 1, 1])


@pytest.fixture
def masked(write_pair) -> str:
    return write_mask(write_pair(DOCUMENTS), MASK)


def change_meta(prefix: str, **changes: object) -> None:
    path = Path(prefix + ".meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error_of(prefix: str) -> str:
    with pytest.raises(DataError) as caught:
        BinidxReader(prefix)
    assert f"{prefix}.mask.bin: " in str(caught.value)
    return str(caught.value)


def test_the_mask_is_the_read_only_content_of_the_file(masked):
    reader = BinidxReader(masked)
    assert reader.meta.mask is True
    assert reader.mask.tobytes() == MASK
    assert reader.mask.dtype == np.uint8
    assert not reader.mask.flags.writeable
    assert reader.trained(2, 5).tolist() == [True, False, True]
    assert reader.trained(3, 3).tolist() == []


def test_without_a_mask_all_tokens_are_trained(write_pair):
    reader = BinidxReader(write_pair(DOCUMENTS))
    assert reader.mask is None
    assert reader.meta.mask is False
    assert reader.trained(2, 4).tolist() == [True, True]


@pytest.mark.parametrize("version", [None, 1])
def test_a_mask_is_used_if_the_sidecar_predates_masks(masked, version):
    """A pair of another program to which a mask was added, and a pair of format version 1."""
    meta = Path(masked + ".meta.json")
    if version is None:
        meta.unlink()
    else:
        fields = json.loads(meta.read_text()) | {"format_version": version}
        del fields["mask"]
        meta.write_text(json.dumps(fields))
    assert BinidxReader(masked).mask.tobytes() == MASK
    Path(masked + ".mask.bin").unlink()
    assert BinidxReader(masked).mask is None


@pytest.mark.parametrize("mask", [b"", MASK[:-1], MASK + b"\0"])
def test_wrong_size(masked, mask):
    Path(masked + ".mask.bin").write_bytes(mask)
    expected = f"wrong size: a mask has one byte for each token of the .bin; found {len(mask)} bytes, expected 7"
    assert expected in error_of(masked)


@pytest.mark.parametrize(("place", "value"), [(0, 2), (6, 255), (3, 128)])
def test_a_value_that_is_neither_0_nor_1(masked, place, value):
    Path(masked + ".mask.bin").write_bytes(MASK[:place] + bytes([value]) + MASK[place + 1 :])
    assert f"invalid value at token {place}; found {value}, expected 0 or 1" in error_of(masked)


def test_a_long_mask_is_checked_when_it_is_used(masked, monkeypatch):
    monkeypatch.setattr(mask_file, "CHECK_ALL_UP_TO", 6)
    monkeypatch.setattr(mask_file, "_CHECK_CHUNK", 2)
    Path(masked + ".mask.bin").write_bytes(MASK[:-1] + b"\x09")
    reader = BinidxReader(masked)
    assert reader.trained(0, 6).tolist() == [value == 1 for value in MASK[:6]]
    with pytest.raises(DataError, match=r"pair\.mask\.bin: invalid value at token 6; found 9"):
        reader.trained(0, 7)


def test_a_missing_mask_is_an_error(masked):
    Path(masked + ".mask.bin").unlink()
    assert "no such file, but the .meta.json says that the pair has a mask" in error_of(masked)


def test_a_leftover_mask_is_an_error(masked):
    change_meta(masked, mask=False)
    assert "the .meta.json says that the pair has no mask. Delete it" in error_of(masked)


def test_a_folder_in_place_of_a_mask(tmp_path):
    folder = tmp_path / "pair.mask.bin"
    folder.mkdir()
    tokens = folder.stat().st_size  # the only size that looks right
    if tokens == 0:
        pytest.skip("folders have no size here")
    prefix = write_files(tmp_path / "pair", index_bytes([tokens], itemsize=1, code=1), bytes(tokens))
    assert "cannot be read; found Is a directory" in error_of(prefix)
