"""Finds and reads the input files, and yields chunks of raw records with the line or row of each.

    JSON lines   .jsonl .ndjson .json   one record per line; blank lines are ignored
    JSON         .json                  an array of records, or one record on several lines
    text         .txt, unknown names    the whole file is one document
    Parquet      .parquet               one record per row

Files may be plain, or compressed with gzip or Zstandard. Compression, Parquet and JSON are recognized by their
content, text by its name. Only one chunk is in memory: arrays are split while they are read, and a large text is cut
into pieces.
"""

from __future__ import annotations

import glob
import io
import re
import select
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from rwkv_peft.data.convert.decompress import damage_of, decompressed
from rwkv_peft.data.convert.json_stream import json_values
from rwkv_peft.errors import BadRecord, DataError

STDIN = "-"
CHUNK_BYTES = 2**20
"""Approximate size of a chunk."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
OWN_OUTPUT = (".meta.json", ".rejects.jsonl")
"""Output files of the converter, which are skipped when a folder is read."""

_WORD_AFTER_NEWLINE = re.compile(rb"\n(?=[A-Za-z\xc3-\xdf\xe4-\xef]|\xe3[\x81-\xbf])")
"""Where a text can be cut: no token of RWKV World or of the usual BPE tokenizers spans a line break and a letter."""


@dataclass(frozen=True)
class Chunk:
    """Some records of one file, in order."""

    path: str
    records: Sequence[bytes] = ()
    numbers: Sequence[int] = ()
    """The line on which each record begins, or its row for Parquet, counted from 1."""
    is_text: bool = False
    """The only record is plain text, or a piece of one, not JSON."""
    first: bool = True
    last: bool = True
    """Whether the text begins and ends in this chunk."""
    damage: BadRecord | None = None
    """Why the rest of the file cannot be read."""
    damage_at: int = 0
    """The line or row of the damage, or the one after the last complete one."""
    bytes_read: int = 0
    """Bytes that were read from the disk for this chunk."""
    unit: Literal["", "row "] = ""

    def place(self, number: int) -> str:
        """Return file and line (or row), for errors."""
        return f"{self.path}:{self.unit}{number}"


def find_sources(inputs: Iterable[str]) -> list[str]:
    """Return the files for paths, folders (with subfolders), glob patterns and `-`.

    They are in the order of the inputs, and sorted for each input.

    Raises:
        DataError: a path does not exist, a pattern matches nothing, or a folder has no file with a known suffix.
    """
    paths: list[str] = []
    for name in inputs:
        found = [name]
        if name != STDIN and not Path(name).exists() and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise DataError(name, "no file matches this pattern")
        for path in found:
            paths += _in_folder(path) if Path(path).is_dir() else [path]
    for path in paths:
        if path != STDIN and not Path(path).exists():
            raise DataError(path, "no such file", expected="a file, a folder, a glob pattern, or - for standard input")
    return paths


def _in_folder(folder: str) -> list[str]:
    found = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file() and _has_known_name(path))
    if not found:
        raise DataError(
            folder, "no input file in this folder", expected=" ".join(SUFFIXES) + ", or one of these with .gz or .zst"
        )
    return found


def _has_known_name(path: Path) -> bool:
    return (
        _plain_name(path.name).endswith(SUFFIXES)
        and not path.name.startswith(".")
        and not path.name.endswith(OWN_OUTPUT)
    )


def is_text_data(path: str) -> bool:
    """Return whether `path` is a file with a suffix that the converter reads, and not the prefix of a binidx pair."""
    return Path(path).is_file() and _has_known_name(Path(path)) and not Path(path + ".idx").exists()


def format_suffix(path: str) -> str:
    """Return the suffix that decides how a file is read, without that of a compression."""
    return Path(_plain_name(path.lower())).suffix


def _plain_name(name: str) -> str:
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name


def total_size(paths: Iterable[str]) -> int | None:
    """Return the size on disk in bytes; None if it is unknown, as for standard input."""
    regular = [Path(path).stat().st_size for path in paths if path != STDIN and Path(path).is_file()]
    return sum(regular) if len(regular) == len(list(paths)) else None


def read_chunks(paths: Iterable[str]) -> Iterator[Chunk]:
    """Yield all records of all files. A damaged file ends with a chunk that has the damage; then the next file follows.

    Raises:
        DataError: a format needs a package that is not installed.
        OSError: a file cannot be read.
    """
    for path in paths:
        if path == STDIN:
            yield from _read_file("<stdin>", _PollingInput(sys.stdin.buffer.raw))
        else:
            with open(path, "rb", buffering=0) as raw:
                yield from _read_file(path, raw)


class _PollingInput:
    """Standard input that wakes up twice a second, so that a signal is handled even if no data comes."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw

    def readinto(self, buffer: memoryview) -> int:
        while not select.select([self._raw], [], [], 0.5)[0]:
            pass
        return self._raw.readinto(buffer) or 0


class _CountingReader(io.RawIOBase):
    """Counts the bytes that are read. Standard input cannot tell its position."""

    def __init__(self, raw: BinaryIO | io.RawIOBase) -> None:
        self._raw, self.count, self._reported = raw, 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        got = self._raw.readinto(buffer) or 0
        self.count += got
        return got

    def new_bytes(self) -> int:
        """Return the bytes read since the last call."""
        new, self._reported = self.count - self._reported, self.count
        return new


def _read_file(path: str, raw: BinaryIO) -> Iterator[Chunk]:
    counted = _CountingReader(raw)
    number = 1
    stream = decompressed(path, io.BufferedReader(counted, CHUNK_BYTES))
    for chunk in _reader_of(path, stream)(path, stream, counted.new_bytes):
        number = chunk.numbers[-1] + 1 if chunk.numbers else number
        yield chunk
        if chunk.damage:
            return
    if damage := damage_of(stream):
        yield Chunk(path, damage_at=number, damage=damage, bytes_read=counted.new_bytes())


Reader = Callable[[str, io.BufferedReader, Callable[[], int]], Iterator[Chunk]]


def _reader_of(path: str, stream: io.BufferedReader) -> Reader:
    name = _plain_name(path.lower())
    head = stream.peek(4096)[:4096]
    if head.startswith(b"PAR1") or name.endswith(".parquet"):
        return _parquet_rows
    if name.endswith(".txt"):
        return _text_pieces
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return _json_items
    if name.endswith(".json") and start.startswith(b"{") and not start.split(b"\n")[0].rstrip().endswith(b"}"):
        # One record on several lines, or JSON lines whose first line is longer than the head: both are read correctly.
        return _json_items
    return _json_lines if name.endswith(SUFFIXES) or start.startswith(b"{") or not start else _text_pieces


def _json_lines(path: str, stream: io.BufferedReader, new_bytes: Callable[[], int]) -> Iterator[Chunk]:
    number = 1
    while lines := stream.readlines(CHUNK_BYTES):
        if damage_of(stream) and not lines[-1].endswith(b"\n"):
            lines.pop()
        numbers: Sequence[int] = range(number, number + len(lines))
        number += len(lines)
        if any(map(bytes.isspace, lines)):
            kept = [(line, n) for line, n in zip(lines, numbers, strict=True) if not line.isspace()]
            lines, numbers = [line for line, _ in kept], [n for _, n in kept]
        yield Chunk(path, lines, numbers, bytes_read=new_bytes())


def _json_items(path: str, stream: io.BufferedReader, new_bytes: Callable[[], int]) -> Iterator[Chunk]:
    records: list[bytes] = []
    numbers: list[int] = []
    size = 0
    try:
        for number, raw in json_values(stream):
            records.append(raw)
            numbers.append(number)
            size += len(raw)
            if size >= CHUNK_BYTES:
                yield Chunk(path, records, numbers, bytes_read=new_bytes())
                records, numbers, size = [], [], 0
    except BadRecord as error:
        yield Chunk(path, records, numbers, bytes_read=new_bytes())
        yield Chunk(path, damage_at=1 + error.line_offset, damage=damage_of(stream) or error)
        return
    yield Chunk(path, records, numbers, bytes_read=new_bytes())


def _text_pieces(path: str, stream: io.BufferedReader, new_bytes: Callable[[], int]) -> Iterator[Chunk]:
    """Yield a text in pieces of about CHUNK_BYTES, cut before a line that begins with a letter (splits no token)."""
    text = stream.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf")
    number, first = 1, True
    while more := stream.read(max(CHUNK_BYTES, len(text))):
        text += more
        cuts = [match.end() for match in _WORD_AFTER_NEWLINE.finditer(text, len(text) // 2)]
        if cuts:
            piece, text = text[: cuts[-1]], text[cuts[-1] :]
            yield Chunk(path, [piece], [number], is_text=True, first=first, last=False, bytes_read=new_bytes())
            number, first = number + piece.count(b"\n"), False
    if not damage_of(stream):
        yield Chunk(path, [text], [number], is_text=True, first=first, bytes_read=new_bytes())


def _parquet_rows(path: str, stream: io.BufferedReader, new_bytes: Callable[[], int]) -> Iterator[Chunk]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(path, "reading Parquet needs the package pyarrow", hint="Run: pip install pyarrow") from error
    import orjson

    number = 1
    with tempfile.TemporaryFile() as spooled:  # the index of a Parquet file is at its end
        while block := stream.read(CHUNK_BYTES):
            spooled.write(block)
        if damage_of(stream):
            return
        spooled.seek(0)
        try:
            for batch in parquet.ParquetFile(spooled).iter_batches(batch_size=256):
                rows = [orjson.dumps(row, default=str) for row in batch.to_pylist()]
                yield Chunk(path, rows, range(number, number + len(rows)), unit="row ", bytes_read=new_bytes())
                number += len(rows)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            what = "damaged, or not a Parquet file"
            yield Chunk(
                path, damage_at=number, unit="row ", damage=BadRecord(what, found=error), bytes_read=new_bytes()
            )
