"""Reads token files: the MMIDIDX pair of Megatron and GPT-NeoX, which RWKV-LM and RWKV-PEFT read and write too.

    PREFIX.bin        all tokens of all items, one after another, without a header
    PREFIX.idx        magic, u64 version, u8 dtype code, u64 number of items, u64 number of document marks,
                      i32 length of each item, i64 byte offset of each item in .bin,
                      i64 document marks: the first item of each document, then the number of items
    PREFIX.meta.json  optional, only ours: which tokenizer made the ids, and whether the pair has a mask
    PREFIX.mask.bin   optional, only ours: which tokens are in the loss (mask_file.py)

All numbers are little-endian. RWKV's files have one item per document, so their marks are 0, 1, 2, ..., n. Other marks
group items into documents. A file whose writer never ended a document has one mark, 0: its items are its documents.
writer.py writes these files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_peft.data.binidx.mask_file import check_mask, map_mask
from rwkv_peft.data.tokenizer import same_tokenizer
from rwkv_peft.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, marks

TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOAT_DTYPES = {6: "float32", 7: "float64"}

META_VERSION = 2  # version 1 had no mask

SUFFIXES = (".bin", ".mask.bin", ".meta.json", ".idx")
"""Suffixes of a pair's files, in the order in which the writer puts them in place."""
_REMAKE = "The file is damaged or incomplete: copy it again, or convert again with rwkv-peft convert."


@dataclass(frozen=True)
class BinidxMeta:
    """The content of PREFIX.meta.json."""

    format_version: int
    tokenizer: Mapping[str, str]
    """`name` and `sha256`: the tokenizer's identity."""
    tokenizer_spec: str
    """The value of `--tokenizer` that made the pair."""
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    mask: bool = False
    """Whether the pair has a PREFIX.mask.bin."""
    is_validation: bool = False
    """Whether it is the validation half of another pair (`held_out` in the file)."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields under their names in the file."""
        fields = asdict(self)
        return fields | {"held_out": fields.pop("is_validation")}


class BinidxReader:
    """A memory-mapped pair.

    Opening reads the index and checks it against the size of the .bin. It reads no token, and a mask only if it is
    short.

    Args:
        data_file: the path without suffix. A path that ends in .bin, .idx or _text_document is accepted too.
    Raises:
        DataError: a file is missing, empty, incomplete, has a different format, or does not belong to the others.
    """

    def __init__(self, data_file: str | Path) -> None:
        self.prefix = find_prefix(str(data_file))
        dtype, self.bounds = _read_index(Path(self.prefix + ".idx"))
        self.tokens: np.ndarray = _map_tokens(Path(self.prefix + ".bin"), dtype, int(self.bounds[-1]))
        """(tokens,) of `dtype`, read-only: all documents, one after another."""
        self.meta = _read_meta(Path(self.prefix + ".meta.json"), documents=len(self), tokens=len(self.tokens))
        has_mask = None if self.meta is None or self.meta.format_version < 2 else self.meta.mask
        self._mask_path = Path(self.prefix + ".mask.bin")
        self.mask: np.ndarray | None = map_mask(self._mask_path, len(self.tokens), has_mask)
        """(tokens,) uint8, read-only: 1 if the token is in the loss. None if the pair has no mask."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.bounds) - 1

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document i, (sizes[i],) of `dtype`, as a view of the file."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.tokens[self.bounds[i] : self.bounds[i + 1]]

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens start..stop the pair's mask trains, (stop - start,) bool; all without a mask.

        Raises:
            DataError: the mask has a value other than 0 and 1 there. Opening does not check long masks.
        """
        if self.mask is None:
            return np.ones(stop - start, dtype=bool)
        check_mask(self._mask_path, self.mask, start, stop)
        return self.mask[start:stop] == 1

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return np.diff(self.bounds)

    @property
    def dtype(self) -> np.dtype:
        return self.tokens.dtype


def check_tokenizer(reader: BinidxReader, expected: Mapping[str, str] | None, whose: str) -> None:
    """Raise DataError if a pair was made with a different tokenizer than expected.

    Args:
        reader: the pair. A pair without a sidecar is accepted.
        expected: the tokenizer's identity; None accepts any.
        whose: where `expected` comes from, such as "the adapter's".
    """
    if expected is None or reader.meta is None or same_tokenizer(reader.meta.tokenizer, expected):
        return
    raise DataError(
        reader.prefix,
        f"made with a different tokenizer than {whose}",
        found=_named(reader.meta.tokenizer),
        expected=_named(expected),
        hint="Convert the text again with that tokenizer (rwkv-peft convert --tokenizer).",
    )


def _named(identity: Mapping[str, str]) -> str:
    return f"{identity['name']} (sha256 {identity['sha256'][:12]})"


def find_prefix(data_file: str) -> str:
    """Return the prefix that `data_file` means: as given, without .bin or .idx, or also without _text_document.

    The first of these for which a file exists; if there is none, without .bin or .idx.
    """
    bare = data_file.removesuffix(".bin").removesuffix(".idx")
    for prefix in (data_file, bare, bare.removesuffix("_text_document")):
        if any(Path(prefix + suffix).exists() for suffix in (".idx", ".bin")):
            return prefix
    return bare


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Return the token dtype, and the bounds: (documents + 1,) int64, each document's first token and the last end."""
    if not path.exists():
        hint = (
            "Give the prefix of a pair, without .bin and .idx. "
            "To make a pair: rwkv-peft convert (tools/json2binidx.py)."
        )
        raise DataError(str(path), "no such file", hint=hint)
    raw = _read(path)
    dtype, items, marks = _read_header(path, raw)
    # Check the counts against the file size before allocating memory for them.
    expected = HEADER.size + (4 + 8) * items + 8 * marks
    if len(raw) != expected:
        what = f"wrong size for {items} items and {marks} document marks"
        raise DataError(str(path), what, found=f"{len(raw)} bytes", expected=expected, hint=_REMAKE)
    sizes = np.frombuffer(raw, "<i4", items, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", items, HEADER.size + 4 * items)
    item_bounds = _item_bounds(path, sizes, pointers, dtype.itemsize)
    if marks <= 1:
        return dtype, item_bounds
    return dtype, item_bounds[_check_marks(path, np.frombuffer(raw, "<i8", marks, len(raw) - 8 * marks), items)]


def _read_header(path: Path, raw: bytes) -> tuple[np.dtype, int, int]:
    """Return the token dtype, the number of items and the number of document marks."""
    if len(raw) < HEADER.size:
        found, expected = f"{len(raw)} bytes", f"{HEADER.size} or more"
        raise DataError(str(path), "incomplete", found=found, expected=expected, hint=_REMAKE)
    magic, version, code, items, marks = HEADER.unpack_from(raw)
    if magic != MAGIC:
        hint = "Only the MMIDIDX format of Megatron, GPT-NeoX and RWKV-LM is supported."
        raise DataError(str(path), "not a binidx index", found=magic, expected=MAGIC, hint=hint)
    if version != VERSION:
        raise DataError(str(path), "unsupported format version", found=version, expected=VERSION, hint=_REMAKE)
    if code not in TOKEN_DTYPES:
        found = FLOAT_DTYPES.get(code, f"dtype code {code}")
        raise DataError(str(path), "does not contain token ids", found=found, expected="an integer dtype", hint=_REMAKE)
    if items == 0:
        raise DataError(str(path), "contains no documents", hint="Convert again with rwkv-peft convert.")
    return np.dtype(TOKEN_DTYPES[code]), items, marks


def _item_bounds(path: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> np.ndarray:
    """Return (items + 1,) int64: each item's first token, and the end of the last item."""
    if sizes.min() < 0:
        item = int(np.argmax(sizes < 0))
        raise DataError(str(path), f"negative length of item {item}", found=sizes[item], hint=_REMAKE)
    bounds = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, dtype=np.int64, out=bounds[1:])
    wrong = pointers != bounds[:-1] * itemsize
    if wrong.any():
        item = int(np.argmax(wrong))
        what, expected = f"wrong offset of item {item}", f"{bounds[item] * itemsize}, the end of the previous item"
        raise DataError(str(path), what, found=pointers[item], expected=expected, hint=_REMAKE)
    return bounds


def _check_marks(path: Path, marks: np.ndarray, items: int) -> np.ndarray:
    if marks[0] != 0 or marks[-1] != items or (marks[1:] < marks[:-1]).any():
        expected = f"ascending numbers from 0 to {items}"
        raise DataError(str(path), "invalid document marks", found=_abbreviated(marks), expected=expected, hint=_REMAKE)
    return marks


def _abbreviated(numbers: np.ndarray) -> str:
    return ", ".join(str(n) for n in numbers) if len(numbers) <= 4 else f"{numbers[0]}, {numbers[1]}, .. {numbers[-1]}"


def _map_tokens(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    if not path.exists():
        raise DataError(str(path), "no such file", hint="Its .idx exists: copy the .bin too.")
    found, expected = path.stat().st_size, tokens * dtype.itemsize
    if found == 0:
        raise DataError(str(path), "is empty", hint="Convert again with rwkv-peft convert.")
    if found != expected:
        what = f"wrong size for its .idx, which lists {tokens} tokens of {dtype.name}"
        hint = "One of the two is incomplete or belongs to another pair: copy both again, or convert again."
        raise DataError(str(path), what, found=f"{found} bytes", expected=expected, hint=hint)
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error


def _read_meta(path: Path, *, documents: int, tokens: int) -> BinidxMeta | None:
    """Return the sidecar; None if there is none, because other tools do not write one."""
    if not path.exists():
        return None
    hint = f"If another tool has rewritten the pair, delete {path.name}."
    try:
        meta = _parse_meta(_read(path))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        found = f"no key {error}" if isinstance(error, KeyError) else error
        raise DataError(str(path), "damaged", found=found, hint=hint) from error
    if not 1 <= meta.format_version <= META_VERSION:
        expected = f"1 to {META_VERSION}"
        raise DataError(str(path), "unsupported format version", found=meta.format_version, expected=expected)
    if (meta.documents, meta.tokens) != (documents, tokens):
        found = f"{meta.documents} documents and {meta.tokens} tokens"
        expected = f"{documents} and {tokens}"
        raise DataError(str(path), "describes another pair", found=found, expected=expected, hint=hint)
    return meta


def _parse_meta(raw: bytes) -> BinidxMeta:
    """Parse the sidecar. Unknown keys, which a later version may add, are ignored."""
    fields = json.loads(raw)
    numbers = {key: int(fields[key]) for key in ("format_version", "vocab_size", "eod", "documents", "tokens")}
    mask = fields["mask"] if numbers["format_version"] > 1 else False
    is_validation = fields.get("held_out", False)
    for key, value in (("mask", mask), ("held_out", is_validation)):
        if not isinstance(value, bool):
            raise TypeError(f"{key} is {value!r}, expected true or false")
    if not 0 <= numbers["eod"] < numbers["vocab_size"]:
        raise ValueError(f"eod {numbers['eod']} is not in a vocabulary of {numbers['vocab_size']} ids")
    texts = {key: str(fields["tokenizer"][key]) for key in ("name", "sha256")}
    spec = str(fields["tokenizer_spec"])
    "".join((*texts.values(), spec)).encode("utf-8")  # a lone surrogate could not be printed
    return BinidxMeta(tokenizer=texts, tokenizer_spec=spec, mask=mask, is_validation=is_validation, **numbers)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error
