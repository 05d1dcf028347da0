"""Files to raw records: find them, open them, cut them into chunks of records with the place of each.

    JSON lines   .jsonl .ndjson .json   a record a line; blank lines are passed over
    JSON         .json                  an array of records, or one record over several lines
    text         .txt, unknown names    the whole file is one document
    Parquet      .parquet               a record a row

Any of them plain, or compressed with gzip or Zstandard. Compression, Parquet and JSON are known by their content, text
by its name. Nothing is held but the chunk at hand: arrays are cut as they stream by, and a large text comes in pieces.
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
"""About this much goes to a worker at a time."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
OWN_OUTPUT = (".meta.json", ".rejects.jsonl")
"""Files of the converter itself, which a folder may hold beside its input."""

_WORD_AFTER_NEWLINE = re.compile(rb"\n(?=[A-Za-z\xc3-\xdf\xe4-\xef]|\xe3[\x81-\xbf])")
"""Where a text may be cut: no token of RWKV World, nor of the usual BPE splitters, spans a line break and a letter."""


@dataclass(frozen=True)
class Chunk:
    """Some records of one file, in order."""

    path: str
    raws: Sequence[bytes] = ()
    numbers: Sequence[int] = ()
    """Where each record begins: its line, or its row for Parquet, counted from 1."""
    is_text: bool = False
    """The raw is a text, or a piece of one, rather than JSON."""
    first: bool = True
    last: bool = True
    """Whether a text begins and ends with this chunk."""
    damage: BadRecord | None = None
    """Why nothing more comes from this file."""
    damage_at: int = 0
    """The line or row of the damage, or after the last whole one."""
    consumed: int = 0
    """Bytes of the file, as it is on disk, that were read for this chunk."""
    unit: Literal["", "row "] = ""

    def place(self, number: int) -> str:
        return f"{self.path}:{self.unit}{number}"


def find_sources(inputs: Iterable[str]) -> list[str]:
    """The files behind paths, folders (searched to the bottom), globs and `-`, in the order given, each sorted within.

    Raises:
        DataError: one of them does not exist, or a folder or glob has no file of a known name.
    """
    paths: list[str] = []
    for name in inputs:
        found = [name]
        if name != STDIN and not Path(name).exists() and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise DataError(name, "no file has such a name")
        for path in found:
            paths += _in_folder(path) if Path(path).is_dir() else [path]
    for path in paths:
        if path != STDIN and not Path(path).exists():
            raise DataError(path, "no such file", expected="a file, a folder, a glob, or - for standard input")
    return paths


def _in_folder(folder: str) -> list[str]:
    found = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file() and _has_known_name(path))
    if not found:
        raise DataError(
            folder, "no file to read in this folder", expected=" ".join(SUFFIXES) + ", or these with .gz or .zst"
        )
    return found


def _has_known_name(path: Path) -> bool:
    return (
        _plain_name(path.name).endswith(SUFFIXES)
        and not path.name.startswith(".")
        and not path.name.endswith(OWN_OUTPUT)
    )


def is_text_data(path: str) -> bool:
    """Whether `path` is a file that the converter reads by its name, and not the prefix of a binidx pair."""
    return Path(path).is_file() and _has_known_name(Path(path)) and not Path(path + ".idx").exists()


def reading_hint(path: str) -> str:
    """What of a file's name decides how it is read: its ending, without that of a compression."""
    return Path(_plain_name(path.lower())).suffix


def _plain_name(name: str) -> str:
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name


def total_size(paths: Iterable[str]) -> int | None:
    """Bytes on disk; None when some are not known beforehand."""
    regular = [Path(path).stat().st_size for path in paths if path != STDIN and Path(path).is_file()]
    return sum(regular) if len(regular) == len(list(paths)) else None


def read_chunks(paths: Iterable[str]) -> Iterator[Chunk]:
    """All records of all files. A file that turns out damaged ends with a chunk that says so; the next one follows.

    Raises:
        DataError: a package is missing for a format.
        OSError: a file cannot be read.
    """
    for path in paths:
        if path == STDIN:
            yield from _read_file("<stdin>", _Patient(sys.stdin.buffer.raw))
        else:
            with open(path, "rb", buffering=0) as raw:
                yield from _read_file(path, raw)


class _Patient:
    """Standard input that looks up twice a second: a signal that came just before a read would else wait for data."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw

    def readinto(self, buffer: memoryview) -> int:
        while not select.select([self._raw], [], [], 0.5)[0]:
            pass
        return self._raw.readinto(buffer) or 0


class _Counted(io.RawIOBase):
    """A stream that knows how much was read of it; standard input cannot tell."""

    def __init__(self, raw: BinaryIO | io.RawIOBase) -> None:
        self._raw, self.count, self._reported = raw, 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        got = self._raw.readinto(buffer) or 0
        self.count += got
        return got

    def news(self) -> int:
        """Bytes read since the last call."""
        fresh, self._reported = self.count - self._reported, self.count
        return fresh


def _read_file(path: str, raw: BinaryIO) -> Iterator[Chunk]:
    counted = _Counted(raw)
    number = 1
    stream = decompressed(path, io.BufferedReader(counted, CHUNK_BYTES))
    for chunk in _reader_of(path, stream)(path, stream, counted.news):
        number = chunk.numbers[-1] + 1 if chunk.numbers else number
        yield chunk
        if chunk.damage:
            return
    if damage := damage_of(stream):
        yield Chunk(path, damage_at=number, damage=damage, consumed=counted.news())


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
        # Over several lines, or a first line longer than the head, which values of their own reads as well.
        return _json_items
    return _json_lines if name.endswith(SUFFIXES) or start.startswith(b"{") or not start else _text_pieces


def _json_lines(path: str, stream: io.BufferedReader, news: Callable[[], int]) -> Iterator[Chunk]:
    number = 1
    while lines := stream.readlines(CHUNK_BYTES):
        if damage_of(stream) and not lines[-1].endswith(b"\n"):
            lines.pop()
        numbers: Sequence[int] = range(number, number + len(lines))
        number += len(lines)
        if any(map(bytes.isspace, lines)):
            kept = [(line, n) for line, n in zip(lines, numbers, strict=True) if not line.isspace()]
            lines, numbers = [line for line, _ in kept], [n for _, n in kept]
        yield Chunk(path, lines, numbers, consumed=news())


def _json_items(path: str, stream: io.BufferedReader, news: Callable[[], int]) -> Iterator[Chunk]:
    raws: list[bytes] = []
    numbers: list[int] = []
    size = 0
    try:
        for number, raw in json_values(stream):
            raws.append(raw)
            numbers.append(number)
            size += len(raw)
            if size >= CHUNK_BYTES:
                yield Chunk(path, raws, numbers, consumed=news())
                raws, numbers, size = [], [], 0
    except BadRecord as error:
        yield Chunk(path, raws, numbers, consumed=news())
        yield Chunk(path, damage_at=1 + error.lines_down, damage=damage_of(stream) or error)
        return
    yield Chunk(path, raws, numbers, consumed=news())


def _text_pieces(path: str, stream: io.BufferedReader, news: Callable[[], int]) -> Iterator[Chunk]:
    """The text in pieces of about CHUNK_BYTES, cut before a line that begins with a letter: there no token is split."""
    text = stream.read(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf")
    number, first = 1, True
    while more := stream.read(max(CHUNK_BYTES, len(text))):
        text += more
        cuts = [match.end() for match in _WORD_AFTER_NEWLINE.finditer(text, len(text) // 2)]
        if cuts:
            piece, text = text[: cuts[-1]], text[cuts[-1] :]
            yield Chunk(path, [piece], [number], is_text=True, first=first, last=False, consumed=news())
            number, first = number + piece.count(b"\n"), False
    if not damage_of(stream):
        yield Chunk(path, [text], [number], is_text=True, first=first, consumed=news())


def _parquet_rows(path: str, stream: io.BufferedReader, news: Callable[[], int]) -> Iterator[Chunk]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(path, "Parquet needs the package pyarrow", hint="pip install pyarrow") from error
    import orjson

    number = 1
    with tempfile.TemporaryFile() as spooled:  # Parquet is read from its end
        while block := stream.read(CHUNK_BYTES):
            spooled.write(block)
        if damage_of(stream):
            return
        spooled.seek(0)
        try:
            for batch in parquet.ParquetFile(spooled).iter_batches(batch_size=256):
                rows = [orjson.dumps(row, default=str) for row in batch.to_pylist()]
                yield Chunk(path, rows, range(number, number + len(rows)), unit="row ", consumed=news())
                number += len(rows)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            what = "damaged, or not Parquet"
            yield Chunk(path, damage_at=number, unit="row ", damage=BadRecord(what, found=error), consumed=news())
