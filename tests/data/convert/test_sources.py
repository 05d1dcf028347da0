"""All input formats give the same records with the same places, and damage is reported."""

from __future__ import annotations

import codecs
import gzip
import io
import json

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rwkv_peft.data.convert import json_stream, sources
from rwkv_peft.data.convert.json_stream import json_values
from rwkv_peft.data.convert.sources import find_sources, read_chunks
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import BadRecord, DataError

RECORDS = [{"text": "Hello."}, {"text": "两行\n文字"}, {"text": 'a "quote" \\ and } ]'}]


def json_lines(records=RECORDS):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def parquet_bytes(records=RECORDS):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


CONTENTS = {
    "a.jsonl": json_lines(),
    "a.ndjson": codecs.BOM_UTF8 + json_lines(),
    "a.json": json.dumps(RECORDS, indent=1).encode(),
    "lines.json": json_lines(),
    "values.json": "\n".join(json.dumps(r, indent=2) for r in RECORDS).encode(),
    "bom.json": codecs.BOM_UTF8 + json.dumps(RECORDS).encode(),
    "array.jsonl": json.dumps(RECORDS).encode(),
    "a.parquet": parquet_bytes(),
    "no_suffix_lines": json_lines(),
    "no_suffix_array": json.dumps(RECORDS).encode(),
    "no_suffix_parquet": parquet_bytes(),
}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def records_of(chunks):
    parsed = [json.loads(raw.removeprefix(codecs.BOM_UTF8)) for chunk in chunks for raw in chunk.records]
    assert not any(chunk.damage for chunk in chunks)
    assert not any(chunk.is_text for chunk in chunks)
    return parsed


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_records(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESSIONS[suffix](CONTENTS[name]))
    chunks = list(read_chunks([str(path)]))
    assert records_of(chunks) == RECORDS
    assert sum(chunk.bytes_read for chunk in chunks) == path.stat().st_size


def test_compression_is_recognized_by_content(tmp_path):
    path = tmp_path / "really_zst.jsonl.gz"
    path.write_bytes(zstandard.compress(json_lines()))
    assert records_of(list(read_chunks([str(path)]))) == RECORDS


def test_several_compressed_streams_in_one_file(tmp_path):
    for suffix, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(compress(json_lines(RECORDS[:1])) + compress(json_lines(RECORDS[1:])))
        assert records_of(list(read_chunks([str(path)]))) == RECORDS


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_is_one_document(tmp_path, suffix):
    path = tmp_path / f"story.txt{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](codecs.BOM_UTF8 + b'["not JSON"]\n\nHere.\n'))
    (chunk,) = read_chunks([str(path)])
    assert (chunk.is_text, chunk.first, chunk.last, chunk.records) == (True, True, True, [b'["not JSON"]\n\nHere.\n'])


def test_the_pieces_of_a_large_text_give_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    text = "".join(f"Paragraph {i}.\r\n\r\n  indented;\n\n\nÄrger\nДа\n中文\n\tthen = {i}\n" for i in range(200))
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8", newline="")
    chunks = list(read_chunks([str(path)]))
    assert len(chunks) > 10
    assert [chunk.first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    pieces = [chunk.records[0].decode() for chunk in chunks]
    assert "".join(pieces) == text
    assert [chunk.numbers[0] for chunk in chunks] == [1 + "".join(pieces[:i]).count("\n") for i in range(len(pieces))]
    world = load_tokenizer("world")
    assert [token for piece in pieces for token in world.encode(piece)] == world.encode(text)


def test_no_token_of_the_world_vocabulary_spans_a_cut():
    table = load_tokenizer("world")._table
    assert any(b"\n" in token for token in table)
    assert [token for token in table if sources._WORD_AFTER_NEWLINE.search(token)] == []


def test_blank_lines_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n \n\r\n{"text": "b"}\n{"text": "c"}')
    chunks = list(read_chunks([str(path)]))
    assert len(chunks) > 1
    assert [number for chunk in chunks for number in chunk.numbers] == [2, 5, 6]


def test_lines_are_counted_in_arrays_too():
    stream = io.BufferedReader(io.BytesIO(b'[\n{"a":\n1},\n\n{"b": 2}, 3\n]\n'))
    assert list(json_values(stream)) == [(2, b'{"a":\n1}'), (5, b'{"b": 2}'), (5, b"3")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON), indent=st.sampled_from([None, 1]), escape=st.booleans(), read=st.integers(1, 40))
def test_any_array_is_split_correctly_wherever_the_buffer_ends(values, indent, escape, read):
    text = json.dumps(values, indent=indent, ensure_ascii=escape).encode("utf-8", "replace")
    values = json.loads(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_READ", read)
        found = [json.loads(raw) for _, raw in json_values(io.BufferedReader(io.BytesIO(text)))]
    assert found == values


BAD_ARRAYS = {
    "cut off": (b'[\n{"a": 1},\n', 2, "the end of the file inside an array"),
    "cut in a string": (b'[{"a": "b', 0, "Unterminated string"),
    "no comma": (b'[1\n{"a": 1}]', 1, "no ',' or ']' after an array element"),
    "comma at the end": (b"[1,\n]", 1, "Expecting value"),
    "more after it": (b"[1]\n\n[2]", 2, "text after the end of the array"),
    "bad value": (b'[1,\n\n{"a": tru}]' + b" " * 50, 2, "Expecting value"),
    "too deep": (b"[1,\n" + b"[" * 100_000, 1, "too many nested brackets"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_invalid_array_is_reported_with_its_line(case):
    content, line_offset, message = BAD_ARRAYS[case]
    with pytest.raises(BadRecord) as caught:
        list(json_values(io.BufferedReader(io.BytesIO(content))))
    assert message in caught.value.reason
    assert caught.value.line_offset == line_offset


def test_an_invalid_value_is_reported_without_reading_the_rest():
    stream = io.BufferedReader(io.BytesIO(b"[1, oops, " + b"1," * 10**7))
    with pytest.raises(BadRecord):
        list(json_values(stream))
    assert stream.tell() < 3 * 2**20


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_incomplete_compressed_file_gives_its_complete_records(tmp_path, name, suffix):
    records = [{"text": f"{i * 7919 % 10007} {i}"} for i in range(40_000)]
    content = {
        "a.jsonl": json_lines(records),
        "a.json": json.dumps(records).encode(),
        "a.txt": b"some text\n" + json_lines(records),
        "a.parquet": parquet_bytes(records),
    }[name]
    whole = COMPRESSIONS[suffix](content)
    path = tmp_path / (name + suffix)
    path.write_bytes(whole[: len(whole) * 3 // 4])
    *chunks, last = read_chunks([str(path)])
    assert "damaged or incomplete" in last.damage.reason
    assert not last.records
    if name in ("a.jsonl", "a.json"):
        found = records_of(chunks)
        assert len(found) > 10_000
        assert found == records[: len(found)]
    else:  # half a text is no document, and Parquet has its index at the end
        assert not any(chunk.last for chunk in chunks)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_flipped_bits_in_a_compressed_file_are_damage(tmp_path, suffix):
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    content = bytearray((gzip.compress if suffix == ".gz" else compressor.compress)(json_lines(RECORDS * 100)))
    content[len(content) // 2] ^= 64
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    assert any(chunk.damage for chunk in read_chunks([str(path)]))


@pytest.mark.parametrize("content", [b"no Parquet", b"", parquet_bytes()[:-20]])
def test_bad_parquet_is_damage(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    (chunk,) = read_chunks([str(path)])
    assert "not a Parquet file" in chunk.damage.reason


def test_rows_of_parquet_are_counted(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes([{"text": str(i)} for i in range(600)]))
    last = list(read_chunks([str(path)]))[-1]
    assert last.place(last.numbers[-1]) == f"{path}:row 600"


@pytest.mark.parametrize(("module", "content"), [("zstandard", zstandard.compress(b"x")), ("pyarrow", parquet_bytes())])
def test_a_missing_package_is_an_error_with_a_hint(tmp_path, monkeypatch, module, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=f"pip install {module}"):
        list(read_chunks([str(path)]))


def test_folders_and_globs(tmp_path):
    names = ["b.jsonl", "a.txt.gz", "deep/er/c.parquet", "d.json.zst"]
    others = ["notes.md", ".hidden.jsonl", "out.meta.json", "out.rejects.jsonl", "out.bin"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_sources([str(tmp_path)]) == sorted(str(tmp_path / name) for name in names)
    assert find_sources([f"{tmp_path}/*.json*"]) == sorted(
        str(tmp_path / name) for name in ("b.jsonl", "d.json.zst", "out.meta.json", "out.rejects.jsonl")
    )
    assert find_sources([f"{tmp_path}/**/c.*", "-"]) == [str(tmp_path / "deep/er/c.parquet"), "-"]
    (tmp_path / "[1].jsonl").write_bytes(b"x")
    assert find_sources([f"{tmp_path}/[1].jsonl"]) == [f"{tmp_path}/[1].jsonl"]


@pytest.mark.parametrize(
    ("name", "message"), [("*.jsonl", "no file matches this pattern"), ("a", "no such file"), ("", "no input file")]
)
def test_nothing_found_is_an_error(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        find_sources([str(tmp_path / name)])
