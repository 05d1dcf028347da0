from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.convert import sources
from rwkv_peft.data.convert.command_line import main
from rwkv_peft.data.convert.conversion import Options, convert
from rwkv_peft.data.convert.encode import encode_all, pack_ids
from rwkv_peft.data.convert.record_text import RecordFormat
from rwkv_peft.data.convert.sources import Chunk
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.files import AtomicFile, temporary_path

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


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    convert([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert len(BinidxReader(tmp_path / "out").tokens) == len("fine") + 1


def test_several_inputs_another_key_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "ab", "text": 1}\r\n\r\n')
    (tmp_path / "b.jsonl").write_bytes(b'\n{"body": "c"}')
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    convert(inputs, str(tmp_path / "out"), load_tokenizer("bytes"), RecordFormat(text_key="body"))
    assert BinidxReader(tmp_path / "out").tokens.tolist() == [98, 99, 0, 100, 0]


BAD_LINES = {
    "malformed": (b'{"text": "a"', "malformed JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "malformed JSON"),
    "too deep": (b"[" * 100_000, "malformed JSON"),
    "long number": (b"9" * 5000, "malformed JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8; found byte 0xff at column 11"),
    "lone surrogate": (b'{"text": "a\\ud83d"}', "lone surrogate); found \\ud83d"),
    "missing key": (b'{"query": "a", "body": "b"}', "no text; found keys query, body, expected 'text', 'messages'"),
    "empty object": (b"{}", "no text; found no keys"),
    "list": (b'["a"]', 'not a JSON object; found a list, expected {"text": "..."}'),
    "null": (b'{"text": null}', "'text' is not a string; found null"),
    "number": (b'{"text": 1.5}', "'text' is not a string; found a number"),
    "empty text": (b'{"text": ""}', "'text' is empty"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_an_invalid_line_is_reported_and_nothing_is_written(tmp_path, case):
    line, message = BAD_LINES[case]
    source = tmp_path / "chat.jsonl"
    source.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        convert([str(source)], str(tmp_path / "out" / "chat"), load_tokenizer("bytes"))
    assert str(caught.value).startswith(f"{source}:4: ")
    assert message in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_invalid_line_keeps_the_old_pair(tmp_path):
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
def test_a_folder_is_not_a_prefix(tmp_path, prefix):
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
    assert "median 51, 90th percentile 91, 99th percentile 100, longest 101 tokens" in printed
    assert all(str(tmp_path / "chat") + suffix in printed for suffix in (".bin", ".idx", ".meta.json"))


def documents_of(prefix):
    reader = BinidxReader(prefix)
    return [tuple(reader.document(i).tolist()) for i in range(len(reader))]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_the_mask_is_exact(tmp_path):
    """The answer's trained tokens include its leading space, its blank line and the eod."""
    world = load_tokenizer("world")
    records = [
        {"question": "2+3?", "answer": "5"},
        {"text": "plain"},
        {"messages": [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c")]]},
    ]
    convert([write_lines(tmp_path / "a.jsonl", records)], str(tmp_path / "out"), world)
    pieces = [
        [("User: 2+3?\n\nAssistant:", 0), (" 5\n\n", 1), (None, 1)],
        [("plain", 1), (None, 1)],
        [("User: a\n\nAssistant:", 0), (" b\n\n", 1), ("User: c\n\n", 0), (None, 0)],
    ]
    ids, mask = [], []
    for text, trains in itertools.chain(*pieces):
        more = [0] if text is None else world.encode(text)
        ids += more
        mask += [trains] * len(more)
    assert BinidxReader(tmp_path / "out").tokens.tolist() == ids
    assert list((tmp_path / "out.mask.bin").read_bytes()) == mask
    assert BinidxReader(tmp_path / "out").meta.mask


def test_plain_text_has_no_mask(tmp_path):
    convert([write_lines(tmp_path / "a.jsonl", [{"text": "a"}])], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert not (tmp_path / "out.mask.bin").exists()


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 3000)
    rng = random.Random(0)
    words = ["alpha", "βeta", "伽马", "\n", "1234", "  ", "{}"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(300)]
    records = [{"text": t} if i % 3 else {"query": f"{i} {t}", "response": f"{i}{t}"} for i, t in enumerate(texts)]
    paths = [write_lines(tmp_path / "a.jsonl", [*records, {"no": "text"}]), str(tmp_path / "long.txt")]
    (tmp_path / "long.txt").write_text("\n".join(texts), encoding="utf-8")
    for workers in (1, 2):
        options = Options(workers=workers, val_fraction=0.3, on_error="skip")
        convert(paths, str(tmp_path / f"w{workers}"), load_tokenizer("world"), options=options)
    made = {path.name.removeprefix("w1"): path.read_bytes() for path in tmp_path.glob("w1*")}
    assert len(made) == 9
    assert {path.name.removeprefix("w2"): path.read_bytes() for path in tmp_path.glob("w2*")} == made


def test_only_a_few_chunks_are_read_ahead():
    begun = 0

    def endless():
        nonlocal begun
        while True:
            begun += 1
            yield Chunk("a", [b'{"text": "a"}'], [begun])

    encoded = encode_all(endless(), load_tokenizer("bytes"), RecordFormat(), 0.0, workers=2)
    for number in range(1, 20):
        assert next(encoded)[0].numbers == [number]
    assert begun <= 19 + 3 * 2 + 1
    encoded.close()


def test_the_validation_pair_is_disjoint_and_stable(tmp_path):
    bytes_tokenizer = load_tokenizer("bytes")
    records = [{"text": f"document {i}"} for i in range(2000)]
    options = Options(val_fraction=0.1)
    summary = convert([write_lines(tmp_path / "a.jsonl", records)], str(tmp_path / "a"), bytes_tokenizer, None, options)
    random.Random(1).shuffle(records)
    more = [*records, records[0], {"text": "new"}]
    convert([write_lines(tmp_path / "b.jsonl", more)], str(tmp_path / "b"), bytes_tokenizer, None, options)
    train, val = set(documents_of(tmp_path / "a")), set(documents_of(tmp_path / "a_val"))
    assert (len(train) + len(val), train & val) == (2000, set())
    assert 140 < len(val) < 260
    assert summary.val_documents == len(val)
    new = (*bytes_tokenizer.encode("new"), 0)
    assert set(documents_of(tmp_path / "b_val")) - {new} == val
    assert set(documents_of(tmp_path / "b")) - {new} == train


def test_without_a_fraction_the_old_validation_pair_is_deleted(tmp_path):
    """The new training pair includes its documents. Another pair of that name stays."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
    prefix, tokenizer = str(tmp_path / "out"), load_tokenizer("bytes")
    convert([path], prefix, tokenizer, options=Options(val_fraction=0.3))
    assert BinidxReader(prefix + "_val").meta.is_validation
    assert not BinidxReader(prefix).meta.is_validation
    convert([path], prefix, tokenizer)
    assert not list(tmp_path.glob("out_val*"))
    assert len(BinidxReader(prefix)) == 100
    convert([path], prefix + "_val", tokenizer)
    convert([path], prefix, tokenizer)
    assert len(BinidxReader(prefix + "_val")) == 100


def test_a_failed_conversion_keeps_the_old_validation_pair(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
    prefix, tokenizer = str(tmp_path / "out"), load_tokenizer("bytes")
    convert([path], prefix, tokenizer, options=Options(val_fraction=0.3))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BinidxWriter, "_index_bytes", disk_full)
    with pytest.raises(DataError, match="the disk is full"):
        convert([path], prefix, tokenizer)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_leftovers_of_a_killed_conversion_are_deleted(tmp_path):
    """Files of running processes and of other outputs stay."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(3)])
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = temporary_path(tmp_path / "x").name.split(".")[2].rpartition("-")[0]
    dead = [f".out.bin.{host}-{child.pid}.tmp", f".out_val.idx.{host}-{child.pid}.tmp"]
    alive = [f".out.bin.{host}-{os.getppid()}.tmp", f".outer.bin.{host}-{child.pid}.tmp"]
    for name in dead + alive:
        (tmp_path / name).write_bytes(b"")
    convert([path], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert {file.name for file in tmp_path.glob(".*")} == set(alive)


def test_both_pairs_have_a_mask_or_none(tmp_path):
    """With this fraction, the only instruction is on one side."""
    records = [{"text": str(i)} for i in range(50)] + [{"query": "q", "response": "r"}]
    path = write_lines(tmp_path / "a.jsonl", records)
    convert([path], str(tmp_path / "out"), load_tokenizer("bytes"), options=Options(val_fraction=0.3))
    for prefix in (tmp_path / "out", tmp_path / "out_val"):
        assert Path(f"{prefix}.mask.bin").stat().st_size == len(BinidxReader(prefix).tokens)


@pytest.mark.parametrize(("fraction", "half"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_an_empty_training_or_validation_pair_is_an_error(tmp_path, fraction, half):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=f"--val_fraction: no document is left for {half}"):
        convert([path], str(tmp_path / "out"), load_tokenizer("bytes"), options=Options(val_fraction=fraction))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_records_are_written_with_their_reasons(tmp_path, workers):
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD + b"".join(line + b"\n" + GOOD for line, _ in BAD_LINES.values()))
    options = Options(on_error="skip", workers=workers)
    summary = convert([str(source)], str(tmp_path / "out"), load_tokenizer("bytes"), options=options)
    assert len(BinidxReader(tmp_path / "out")) == len(BAD_LINES) + 1
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text("utf-8").splitlines()]
    assert summary.rejects == len(rejects) == len(BAD_LINES)
    for i, (reject, (line, message)) in enumerate(zip(rejects, BAD_LINES.values(), strict=True)):
        assert (reject["file"], reject["line"]) == (str(source), 2 * i + 2)
        assert message in reject["reason"]
        assert reject["record"] == line.decode("utf-8", "replace")


def test_a_conversion_without_rejects_deletes_an_old_list(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "out.rejects.jsonl").write_text("old")
    convert([path], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_only_invalid_records_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{\n[]\n")
    with pytest.raises(DataError, match=r"no documents; found 2 rejected"):
        convert(
            [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), load_tokenizer("bytes"), None, Options(on_error="skip")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_invalid_piece_rejects_the_whole_text(tmp_path, monkeypatch, on_error):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"Fine line.\n" * 50 + b"bad \xff line\n" + b"Fine line.\n" * 50)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(3000).hex(" ", 5).encode())[:-1000])
    (tmp_path / "c.txt").write_bytes(b"whole")
    (tmp_path / "d.txt").write_bytes(b"")
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.txt", "d.txt")]
    options = Options(on_error=on_error)
    if on_error == "stop":
        with pytest.raises(DataError, match=r"a\.txt:51: not UTF-8; found byte 0xff at column 5\."):
            convert(files, str(tmp_path / "out"), load_tokenizer("bytes"), None, options)
        return
    summary = convert(files, str(tmp_path / "out"), load_tokenizer("bytes"), None, options)
    assert documents_of(tmp_path / "out") == [(*load_tokenizer("bytes").encode("whole"), 0)]
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [Path(reject["file"]).name for reject in rejects] == ["a.txt", "b.txt.gz", "d.txt"]
    assert "damaged or incomplete" in rejects[1]["reason"]
    assert summary.rejects == 3


def test_a_damaged_file_is_reported_after_its_complete_records(tmp_path):
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919 % 10007) for i in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-3000])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: damaged or incomplete; found Compressed file ended"):
        convert([str(tmp_path / "a.jsonl.gz")], str(tmp_path / "out"), load_tokenizer("bytes"))
    options = Options(on_error="skip")
    convert([str(tmp_path / "a.jsonl.gz")], str(tmp_path / "out"), load_tokenizer("bytes"), None, options)
    whole = len(BinidxReader(tmp_path / "out"))
    (reject,) = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == whole + 1 > 1000


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AtomicFile, "sync", full)
    with pytest.raises(DataError, match=r"out: the disk is full; found No space left on device\. Nothing was"):
        convert([path], str(tmp_path / "out"), load_tokenizer("bytes"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_disk_that_is_still_full_on_closing_leaves_no_temporary_file(tmp_path):
    writer = BinidxWriter(tmp_path / "out", load_tokenizer("bytes"))
    writer._bin.close()
    writer._bin = open("/dev/full", "wb")  # noqa: SIM115
    writer._bin.write(b"buffered")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_packing_never_wraps_an_id():
    u2, i4 = np.dtype("<u2"), np.dtype("<i4")
    assert pack_ids([0, 65535], u2) == b"\0\0\xff\xff"
    assert pack_ids([65536], i4) == b"\0\0\1\0"
    assert pack_ids([], u2) == b""
    for ids, dtype in (([65536], u2), ([2**31], i4), ([-1], u2)):
        with pytest.raises(OverflowError):
            pack_ids(ids, dtype)
