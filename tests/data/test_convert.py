from __future__ import annotations

import json

import pytest

from rwkv_peft.data.binidx import BinidxReader
from rwkv_peft.data.convert import convert, main
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import ConfigError, DataError

GOOD = b'{"text": "fine"}\n'
TEXTS = ["Hello.", "两行\n文字", "😀\u0000", " "]


@pytest.mark.parametrize("spec", ["world", "bytes"])
def test_documents_come_back_as_text(tmp_path, spec):
    tokenizer = load_tokenizer(spec)
    source = tmp_path / "chat.jsonl"
    source.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(TEXTS)))
    convert([str(source)], str(tmp_path / "new" / "folder" / "chat"), tokenizer)
    reader = BinidxReader(tmp_path / "new" / "folder" / "chat")
    assert [reader.document(i).tolist() for i in range(len(reader))] == [[*tokenizer.encode(t), 0] for t in TEXTS]
    assert reader.meta.tokenizer == tokenizer.identity
    assert reader.meta.tokenizer_spec == spec


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    convert([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert len(BinidxReader(tmp_path / "out").tokens) == len("fine") + 1


def test_several_inputs_another_key_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "ab", "text": 1}\r\n\r\n')
    (tmp_path / "b.jsonl").write_bytes(b'\n{"body": "c"}')
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    convert(inputs, str(tmp_path / "out"), load_tokenizer("bytes"), text_key="body")
    assert BinidxReader(tmp_path / "out").tokens.tolist() == [98, 99, 0, 100, 0]


BAD_LINES = {
    "malformed": (b'{"text": "a"', "malformed JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "malformed JSON"),
    "too deep": (b"[" * 100_000, "malformed JSON"),
    "long number": (b"9" * 5000, "malformed JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8; found byte 0xff at column 11"),
    "lone surrogate": (b'{"text": "a\\ud83d"}', "lone surrogate) in the text; found \\ud83d"),
    "missing key": (b'{"query": "a", "response": "b"}', "no text; found keys query, response, expected 'text'"),
    "empty object": (b"{}", "no text; found no keys"),
    "list": (b'["a"]', 'not an object; found a list, expected {"text": "..."}'),
    "null": (b'{"text": null}', "'text' is not a text; found null"),
    "number": (b'{"text": 1.5}', "'text' is not a text; found a number"),
    "empty text": (b'{"text": ""}', "'text' is empty"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, case):
    line, message = BAD_LINES[case]
    source = tmp_path / "chat.jsonl"
    source.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        convert([str(source)], str(tmp_path / "out" / "chat"), load_tokenizer("bytes"))
    assert str(caught.value).startswith(f"{source}:4: ")
    assert message in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_line_leaves_the_old_pair(tmp_path):
    source, prefix = tmp_path / "chat.jsonl", tmp_path / "chat"
    source.write_bytes(GOOD)
    convert([str(source)], str(prefix), load_tokenizer("bytes"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path != source}
    source.write_bytes(GOOD * 3 + b"{")
    with pytest.raises(DataError):
        convert([str(source)], str(prefix), load_tokenizer("bytes"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path != source} == before


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_documents_is_an_error(tmp_path, content):
    source = tmp_path / "empty.jsonl"
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: no documents"):
        convert([str(source)], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert list(tmp_path.iterdir()) == [source]


def test_missing_input_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        convert([str(tmp_path / "nowhere.jsonl")], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    source = tmp_path / "chat.jsonl"
    source.write_bytes(GOOD)
    with pytest.raises(DataError, match=r"chat\.jsonl.*: cannot be read or written; found "):
        convert([str(source)], str(source / "out" / "chat"), load_tokenizer("bytes"))


@pytest.mark.parametrize("prefix", ["", "sub/"])
def test_a_folder_is_no_prefix(tmp_path, prefix):
    argv = ["--input", "x.jsonl", "--output_prefix", f"{tmp_path}/{prefix}"]
    with pytest.raises(ConfigError, match=r"--output_prefix: is a folder"):
        main(argv)


def test_the_summary_counts(tmp_path, capsys):
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in range(1, 101)))
    main(["--input", str(source), "--output_prefix", str(tmp_path / "chat"), "--tokenizer", "bytes"])
    printed = capsys.readouterr().out
    assert "documents  100\n" in printed
    assert "tokens     5,150 " in printed  # 1 + 2 + .. + 100 and an eod for each
    assert "median 51  90% 91  99% 100  longest 101 tokens" in printed
    assert all(str(tmp_path / "chat") + suffix in printed for suffix in (".bin", ".idx", ".meta.json"))
