"""Text to a binidx pair: the work behind tools/json2binidx.py.

Input is JSON lines, one object with a text in each; output has one document per line, ended by the tokenizer's eod.
The first bad line stops the run, and nothing is written.
"""

from __future__ import annotations

import argparse
import codecs
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_peft.data.binidx import BinidxWriter
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_peft.errors import ConfigError, DataError


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    lengths: np.ndarray
    """Tokens of each document, (documents,), its eod included."""
    bytes_read: int
    seconds: float
    files: tuple[str, ...]

    def __str__(self) -> str:
        tokens = int(self.lengths.sum(dtype=np.int64))
        median, p90, p99, longest = np.percentile(self.lengths, (50, 90, 99, 100), method="inverted_cdf")
        megabytes = self.bytes_read / 1e6
        return "\n".join(
            (
                f"documents  {len(self.lengths):,}",
                f"tokens     {tokens:,} ({self.bytes_read / tokens:.2f} bytes read for each)",
                f"lengths    median {median:,}  90% {p90:,}  99% {p99:,}  longest {longest:,} tokens",
                f"read       {megabytes:,.1f} MB in {self.seconds:.1f} s ({megabytes / self.seconds:.1f} MB/s)",
                f"wrote      {'  '.join(self.files)}",
            )
        )


def convert(inputs: Sequence[str], output_prefix: str, tokenizer: Tokenizer, text_key: str = "text") -> Summary:
    """Tokenise JSON lines into OUTPUT_PREFIX.bin, .idx and .meta.json, making the folder where needed.

    Raises:
        DataError: a file cannot be read or written, there is no document, or a line is bad: the error names file:line.
            Nothing is written then, and an older pair of that name stays as it was.
    """
    started = time.perf_counter()
    size = sum(_file_size(path) for path in inputs)
    try:
        with BinidxWriter(output_prefix, tokenizer) as writer:
            for text in _read_texts(inputs, size, text_key):
                writer.add_document([*tokenizer.encode(text), tokenizer.eod])
            if not len(writer.sizes):
                raise DataError(" ".join(inputs), "no documents", expected="one JSON object on a line")
    except OSError as error:
        where = error.filename or output_prefix
        raise DataError(str(where), "cannot be read or written", found=error.strerror) from error
    files = tuple(output_prefix + suffix for suffix in (".bin", ".idx", ".meta.json"))
    return Summary(lengths=writer.sizes, bytes_read=size, seconds=time.perf_counter() - started, files=files)


def _file_size(path: str) -> int:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "no such file"
        raise DataError(path, what, expected="a file of JSON lines")
    return Path(path).stat().st_size


def _read_texts(inputs: Sequence[str], size: int, text_key: str) -> Iterator[str]:
    """The text of each line, under a progress bar on a terminal (`disable=None`). Blank lines are passed over."""
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for path in inputs:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    bar.update(len(line))
                    if not line.isspace():
                        yield parse_text(line, f"{path}:{number}", text_key)


def parse_text(line: bytes, where: str, text_key: str) -> str:
    """The text in one line of JSON; anything but an object with some text in it is a DataError at `where`."""
    try:
        # Windows editors begin a file with a byte order mark.
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise DataError(where, "not UTF-8", found=found, hint="Convert the file with: iconv -t utf-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(where, "malformed JSON", found=error, expected="one object on a line") from error
    text = _text_of(record, where, text_key)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise DataError(where, "half a character (a lone surrogate) in the text", found=found) from error
    return text


def _text_of(record: Any, where: str, text_key: str) -> str:
    if not isinstance(record, dict):
        raise DataError(where, "not an object", found=_json_type(record), expected=f'{{"{text_key}": "..."}}')
    if text_key not in record:
        hint = "Name another key with --text_key. Chat and instruction records are not read yet, only plain text."
        found = "keys " + ", ".join(record) if record else "no keys"
        raise DataError(where, "no text", found=found, expected=repr(text_key), hint=hint)
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(where, f"{text_key!r} is not a text", found=_json_type(text), expected="a string")
    if not text:
        raise DataError(where, f"{text_key!r} is empty", hint="Remove the line.")
    return text


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="json2binidx.py", description="Tokenise JSON lines into a binidx pair for training.", allow_abbrev=False
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files of JSON lines, read in order")
    parser.add_argument("--output_prefix", required=True, metavar="PREFIX", help="makes PREFIX.bin, .idx, .meta.json")
    parser.add_argument("--tokenizer", default="world", help="world (default), bytes or the path of a tokenizer.json")
    parser.add_argument("--text_key", default="text", metavar="KEY", help="key of the text in each object (text)")
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks for mistakes in the input too")
    return parser


def main(argv: Sequence[str]) -> None:
    """Convert as the flags in `argv` say, and print the summary."""
    args = build_parser().parse_args(argv)
    prefix = args.output_prefix
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise ConfigError("output_prefix", what="is a folder", found=prefix, expected="folder/name, without suffix")
    print(convert(args.input, prefix, load_tokenizer(args.tokenizer), args.text_key))
