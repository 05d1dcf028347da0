"""Token files, read: the MMIDIDX pair of Megatron and GPT-NeoX, which RWKV-LM and RWKV-PEFT read and write.

    PREFIX.bin        all tokens of all items, one after another, with no header
    PREFIX.idx        magic, u64 version, u8 dtype code, u64 number of items, u64 number of marks,
                      i32 length of each item, i64 byte offset of each item in .bin,
                      i64 marks: the first item of each document, and at the end the number of items
    PREFIX.meta.json  ours, and optional: which tokenizer made the ids, and whether there is a mask
    PREFIX.mask.bin   ours, and optional: which tokens train (`mask_file.py`)

All numbers are little-endian. RWKV's files have one item per document, so their marks are 0, 1, 2, ..., n. Other marks
group items into documents. A file whose writer never ended a document has one mark, 0: its items are its documents.
`binidx_writer.py` writes them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_peft.data.binidx.mask_file import check_mask, map_mask
from rwkv_peft.data.tokenizer import same_tokenizer
from rwkv_peft.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, marks

TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOAT_DTYPES = {6: "float32", 7: "float64"}

META_VERSION = 2  # 1 knew of no mask

SUFFIXES = (".bin", ".mask.bin", ".meta.json", ".idx")
"""Of a pair's files, in the order in which they appear."""
_REMAKE = "The file is damaged or was cut off: copy it again, or remake the pair with tools/json2binidx.py."


@dataclass(frozen=True)
class BinidxMeta:
    """What PREFIX.meta.json says about a pair."""

    format_version: int
    tokenizer: Mapping[str, str]
    """`name` and `sha256`: the identity of the tokenizer."""
    tokenizer_spec: str
    """How `--tokenizer` named it."""
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    mask: bool = False
    """Whether PREFIX.mask.bin belongs to the pair."""
    held_out: bool = False
    """Whether it is the validation half of another pair, which the converter wrote with it."""


class BinidxReader:
    """A pair, memory-mapped. Opening reads the index and checks it against the size of the .bin; no token is read,
    and the mask only where it is short.

    Args:
        data_file: the path without suffix. A path that ends in .bin, .idx or _text_document is understood too.
    Raises:
        DataError: a file is missing, empty, cut off, of another format, or does not belong to the others.
    """

    def __init__(self, data_file: str | Path) -> None:
        self.prefix = find_prefix(str(data_file))
        dtype, self.bounds = _read_index(Path(self.prefix + ".idx"))
        self.tokens: np.ndarray = _map_tokens(Path(self.prefix + ".bin"), dtype, int(self.bounds[-1]))
        """(tokens,) of `dtype`, read-only: the stream of all documents."""
        self.meta = _read_meta(Path(self.prefix + ".meta.json"), documents=len(self), tokens=len(self.tokens))
        promised = None if self.meta is None or self.meta.format_version < 2 else self.meta.mask
        self._mask_path = Path(self.prefix + ".mask.bin")
        self.mask: np.ndarray | None = map_mask(self._mask_path, len(self.tokens), promised)
        """(tokens,) uint8, read-only: 1 where predicting that token trains. None where the pair has no mask."""

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.bounds) - 1

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, (sizes[i],) of `dtype`, a view of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.tokens[self.bounds[i] : self.bounds[i + 1]]

    def trained(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool: which of the tokens start..stop train by the pair's mask; all of them without one.

        Raises:
            DataError: the mask has a value other than 0 and 1 there (of a long mask, opening did not look).
        """
        if self.mask is None:
            return np.ones(stop - start, dtype=bool)
        check_mask(self._mask_path, self.mask, start, stop)
        return self.mask[start:stop] == 1

    @property
    def sizes(self) -> np.ndarray:
        """Length of each document in tokens, (documents,) int64."""
        return np.diff(self.bounds)

    @property
    def dtype(self) -> np.dtype:
        return self.tokens.dtype


def check_tokenizer(reader: BinidxReader, expected: Mapping[str, str] | None, whose: str) -> None:
    """Raise DataError where a pair and something else (`whose`) both know their tokenizers, and these are two."""
    if expected is None or reader.meta is None or same_tokenizer(reader.meta.tokenizer, expected):
        return
    raise DataError(
        reader.prefix,
        f"made with another tokenizer than {whose}",
        found=_named(reader.meta.tokenizer),
        expected=_named(expected),
        hint="Convert the text again with that tokenizer (tools/json2binidx.py --tokenizer).",
    )


def _named(identity: Mapping[str, str]) -> str:
    return f"{identity['name']} (sha256 {identity['sha256'][:12]})"


def find_prefix(data_file: str) -> str:
    """`data_file` as it is where such files exist, else without .bin or .idx, else without _text_document too."""
    bare = data_file.removesuffix(".bin").removesuffix(".idx")
    for prefix in (data_file, bare, bare.removesuffix("_text_document")):
        if any(Path(prefix + suffix).exists() for suffix in (".idx", ".bin")):
            return prefix
    return bare


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Token dtype, and (documents + 1,) int64: where each document begins in the stream, and where the last ends."""
    if not path.exists():
        hint = "--data_file is the path of a pair without .bin and .idx; tools/json2binidx.py makes one."
        raise DataError(str(path), "no such file", hint=hint)
    raw = _read(path)
    dtype, items, marks = _read_header(path, raw)
    # The counts are not to be trusted with memory before the size of the file confirms them.
    expected = HEADER.size + (4 + 8) * items + 8 * marks
    if len(raw) != expected:
        what = f"size does not fit {items} items and {marks} marks"
        raise DataError(str(path), what, found=f"{len(raw)} bytes", expected=expected, hint=_REMAKE)
    sizes = np.frombuffer(raw, "<i4", items, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", items, HEADER.size + 4 * items)
    item_bounds = _item_bounds(path, sizes, pointers, dtype.itemsize)
    if marks <= 1:
        return dtype, item_bounds
    return dtype, item_bounds[_check_marks(path, np.frombuffer(raw, "<i8", marks, len(raw) - 8 * marks), items)]


def _read_header(path: Path, raw: bytes) -> tuple[np.dtype, int, int]:
    """Token dtype, number of items, number of marks."""
    if len(raw) < HEADER.size:
        found, expected = f"{len(raw)} bytes", f"{HEADER.size} or more"
        raise DataError(str(path), "cut off", found=found, expected=expected, hint=_REMAKE)
    magic, version, code, items, marks = HEADER.unpack_from(raw)
    if magic != MAGIC:
        hint = "Only the MMIDIDX format of Megatron, GPT-NeoX and RWKV-LM is read."
        raise DataError(str(path), "not a binidx index", found=magic, expected=MAGIC, hint=hint)
    if version != VERSION:
        raise DataError(str(path), "unknown format version", found=version, expected=VERSION, hint=_REMAKE)
    if code not in TOKEN_DTYPES:
        found = FLOAT_DTYPES.get(code, f"dtype code {code}")
        raise DataError(str(path), "holds no token ids", found=found, expected="an integer dtype", hint=_REMAKE)
    if items == 0:
        raise DataError(str(path), "holds no documents", hint="Remake the pair with tools/json2binidx.py.")
    return np.dtype(TOKEN_DTYPES[code]), items, marks


def _item_bounds(path: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> np.ndarray:
    """(items + 1,) int64: where each item begins in the stream of tokens, and where the last ends."""
    if sizes.min() < 0:
        item = int(np.argmax(sizes < 0))
        raise DataError(str(path), f"length of item {item} is negative", found=sizes[item], hint=_REMAKE)
    bounds = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, dtype=np.int64, out=bounds[1:])
    wrong = pointers != bounds[:-1] * itemsize
    if wrong.any():
        item = int(np.argmax(wrong))
        expected = f"{bounds[item] * itemsize}, the sum of the lengths before it"
        raise DataError(str(path), f"bad offset of item {item}", found=pointers[item], expected=expected, hint=_REMAKE)
    return bounds


def _check_marks(path: Path, marks: np.ndarray, items: int) -> np.ndarray:
    if marks[0] != 0 or marks[-1] != items or (marks[1:] < marks[:-1]).any():
        expected = f"numbers that rise from 0 to {items}"
        raise DataError(str(path), "bad document marks", found=_abbreviated(marks), expected=expected, hint=_REMAKE)
    return marks


def _abbreviated(numbers: np.ndarray) -> str:
    return ", ".join(str(n) for n in numbers) if len(numbers) <= 4 else f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]}"


def _map_tokens(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    if not path.exists():
        raise DataError(str(path), "no such file", hint="Its .idx is there: copy the other half of the pair too.")
    found, expected = path.stat().st_size, tokens * dtype.itemsize
    if found == 0:
        raise DataError(str(path), "is empty", hint="Remake the pair with tools/json2binidx.py.")
    if found != expected:
        what = f"does not belong to its .idx ({tokens} tokens of {dtype.name})"
        hint = "One of the two was cut off or comes from another run: copy both again, or remake them."
        raise DataError(str(path), what, found=f"{found} bytes", expected=expected, hint=hint)
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error


def _read_meta(path: Path, *, documents: int, tokens: int) -> BinidxMeta | None:
    """The sidecar, or None where there is none: other tools write the pair alone."""
    if not path.exists():
        return None
    hint = f"If another tool remade the pair since, delete {path.name}."
    try:
        meta = _parse_meta(_read(path))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(str(path), "damaged", found=repr(error), hint=hint) from error
    if not 1 <= meta.format_version <= META_VERSION:
        expected = f"1 to {META_VERSION}"
        raise DataError(str(path), "unknown format version", found=meta.format_version, expected=expected)
    if (meta.documents, meta.tokens) != (documents, tokens):
        found = f"{meta.documents} documents and {meta.tokens} tokens"
        expected = f"{documents} and {tokens}"
        raise DataError(str(path), "is about another pair", found=found, expected=expected, hint=hint)
    return meta


def _parse_meta(raw: bytes) -> BinidxMeta:
    """Keys that a later version may add are passed over."""
    fields = json.loads(raw)
    numbers = {key: int(fields[key]) for key in ("format_version", "vocab_size", "eod", "documents", "tokens")}
    flags = {
        "mask": fields["mask"] if numbers["format_version"] > 1 else False,
        "held_out": fields.get("held_out", False),
    }
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{key} is {value!r}, neither true nor false")
    if not 0 <= numbers["eod"] < numbers["vocab_size"]:
        raise ValueError(f"eod {numbers['eod']} is no id of a vocabulary of {numbers['vocab_size']}")
    texts = {key: str(fields["tokenizer"][key]) for key in ("name", "sha256")}
    spec = str(fields["tokenizer_spec"])
    "".join((*texts.values(), spec)).encode("utf-8")  # half a character (a lone surrogate) could not be printed
    return BinidxMeta(tokenizer=texts, tokenizer_spec=spec, **flags, **numbers)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error
