"""Token files: the MMIDIDX pair of Megatron and GPT-NeoX, which RWKV-LM and RWKV-PEFT read and write.

    PREFIX.bin        all tokens of all items, one after another, with no header
    PREFIX.idx        magic, u64 version, u8 dtype code, u64 number of items, u64 number of marks,
                      i32 length of each item, i64 byte offset of each item in .bin,
                      i64 marks: the first item of each document, and at the end the number of items
    PREFIX.meta.json  ours, and optional: which tokenizer made the ids, and whether there is a mask
    PREFIX.mask.bin   ours, and optional: which tokens train (`mask_file.py`)

All numbers are little-endian. RWKV's files have one item per document, so their marks are 0, 1, 2, ..., n. Other marks
group items into documents. A file whose writer never ended a document has one mark, 0: its items are its documents.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from rwkv_peft.data.mask_file import check_mask, map_mask
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, marks

TOKEN_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOAT_DTYPES = {6: "float32", 7: "float64"}

META_VERSION = 2  # 1 knew of no mask

_SUFFIXES = (".bin", ".mask.bin", ".meta.json", ".idx")  # in the order in which they appear
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
    mask = fields["mask"] if numbers["format_version"] > 1 else False
    if not isinstance(mask, bool):
        raise TypeError(f"mask is {mask!r}, neither true nor false")
    if not 0 <= numbers["eod"] < numbers["vocab_size"]:
        raise ValueError(f"eod {numbers['eod']} is no id of a vocabulary of {numbers['vocab_size']}")
    texts = {key: str(fields["tokenizer"][key]) for key in ("name", "sha256")}
    spec = str(fields["tokenizer_spec"])
    "".join((*texts.values(), spec)).encode("utf-8")  # half a character (a lone surrogate) could not be printed
    return BinidxMeta(tokenizer=texts, tokenizer_spec=spec, mask=mask, **numbers)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error


class BinidxWriter:
    """Writes a pair and its sidecar, a document at a time; as a context manager it finalizes, or aborts on an error.

    Everything goes to temporary files beside the target. Only when they are whole and on disk does the old .idx go,
    and the new one comes last: a reader finds the old pair, the new pair, or no .idx, never halves of two pairs.

    Args:
        prefix: path without suffix; its folder is made.
        tokenizer: decides the dtype (uint16 while the vocabulary fits, else int32) and goes into the sidecar.
        with_mask: write PREFIX.mask.bin. The first document that comes with a mask asks for it too; what is added
            without one trains everywhere. A pair without a mask removes the .mask.bin of an older pair.
    Raises:
        OSError: as the file system gives it.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer, with_mask: bool = False) -> None:
        self.prefix = str(prefix)
        self._tokenizer = tokenizer
        self._code, self._typecode = (8, "H") if tokenizer.vocab_size <= 2**16 else (4, "i")
        self._sizes = array("i")
        self._unfinished = False
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._temporary(".bin"), "wb")  # noqa: SIM115  closed by prepare or abort
        self._mask: BinaryIO | None = None
        if with_mask:
            self.begin_mask()

    def __enter__(self) -> BinidxWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()

    def add_document(self, ids: Sequence[int], mask: Sequence[int] | None = None) -> None:
        """Append one document: ids below the tokenizer's vocab_size, the last of them eod; mask 0 or 1 for each.

        Raises:
            OverflowError: an id does not fit the dtype.
            ValueError: the mask has another length than ids, or other numbers.
        """
        tokens = array(self._typecode, ids)  # as fast as numpy for lists, and never wraps an id that is too large
        self.add_encoded(tokens.tobytes(), (len(tokens),), None if mask is None else bytes(mask))

    def add_encoded(
        self, tokens: bytes, sizes: Sequence[int], mask: bytes | None = None, *, goes_on: bool = False
    ) -> None:
        """Append documents whose ids are bytes of the file's dtype already. `goes_on`: the last one is not whole yet,
        and what is added next continues it."""
        count = sum(sizes)
        if len(tokens) != count * self._itemsize:
            raise ValueError(f"{len(tokens)} bytes for {count} tokens of {self._itemsize} bytes")
        if mask is not None and (len(mask) != count or mask.strip(b"\0\1")):
            raise ValueError(f"a mask of {len(mask)} for {count} tokens, or with numbers other than 0 and 1")
        if mask is not None:
            self.begin_mask()
        self._bin.write(tokens)
        if self._mask is not None:
            self._mask.write(b"\1" * count if mask is None else mask)
        if self._unfinished and sizes:
            self._sizes[-1] += sizes[0]
            sizes = sizes[1:]
        self._sizes.extend(sizes)
        self._unfinished = goes_on

    def drop_unfinished(self) -> int:
        """Take back the document that `goes_on`, if there is one; returns how many tokens that was."""
        if not self._unfinished:
            return 0
        dropped = self._sizes.pop()
        self._unfinished = False
        for file, itemsize in ((self._bin, self._itemsize), (self._mask, 1)):
            if file is not None:
                file.seek(-dropped * itemsize, os.SEEK_CUR)
                file.truncate()
        return dropped

    def begin_mask(self) -> None:
        """From here on there is a mask; what was added so far trains everywhere."""
        if self._mask is None:
            self._mask = open(self._temporary(".mask.bin"), "wb")  # noqa: SIM115  closed by prepare or abort
            left = int(self.sizes.sum(dtype=np.int64))
            while left:
                left -= self._mask.write(b"\1" * min(left, 2**20))

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    @property
    def sizes(self) -> np.ndarray:
        """Length of each document so far, (documents,) int32."""
        return np.array(self._sizes, dtype=np.int32)

    def finalize(self) -> None:
        """Put the pair in place. Does nothing when that, or abort, has happened already."""
        if not self._bin.closed:
            finalize_together([self])

    def prepare(self) -> None:
        """All of the new pair on disk, in temporary files; nothing can be added any more."""
        _sync_and_close(self._bin)
        if self._mask is not None:
            _sync_and_close(self._mask)
        self._write_temporary(".meta.json", self._meta_bytes())
        self._write_temporary(".idx", self._index_bytes())

    def abort(self) -> None:
        """Remove what was written; an old pair stays as it is."""
        for file in (self._bin, self._mask):
            if file is not None:
                with suppress(OSError):  # on a full disk closing fails again, for what is still buffered
                    file.close()
        for suffix in _SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def remove_old_index(self) -> None:
        Path(self.prefix + ".idx").unlink(missing_ok=True)

    def replace_old_pair(self) -> None:
        for suffix in _SUFFIXES:
            _sync_folder(self._folder)  # the order on disk must be the order here
            if suffix == ".mask.bin" and self._mask is None:
                Path(self.prefix + suffix).unlink(missing_ok=True)
            else:
                self._temporary(suffix).replace(self.prefix + suffix)
        _sync_folder(self._folder)

    def _index_bytes(self) -> bytes:
        sizes = self.sizes
        pointers = np.zeros(len(sizes), dtype="<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self._itemsize
        marks = np.arange(len(sizes) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(marks))
        return header + sizes.astype("<i4").tobytes() + pointers.tobytes() + marks.tobytes()

    def _meta_bytes(self) -> bytes:
        meta = BinidxMeta(
            format_version=META_VERSION,
            tokenizer=dict(self._tokenizer.identity),
            tokenizer_spec=self._tokenizer.spec,
            vocab_size=self._tokenizer.vocab_size,
            eod=self._tokenizer.eod,
            documents=len(self._sizes),
            tokens=int(self.sizes.sum(dtype=np.int64)),
            mask=self.has_mask,
        )
        return (json.dumps(asdict(meta), indent=2, ensure_ascii=False) + "\n").encode("utf-8")

    def _write_temporary(self, suffix: str, content: bytes) -> None:
        with open(self._temporary(suffix), "wb") as file:
            file.write(content)
            _sync_and_close(file)

    @property
    def _itemsize(self) -> int:
        return array(self._typecode).itemsize

    @property
    def _folder(self) -> Path:
        return Path(self.prefix).parent

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.{os.getpid()}.tmp")


def finalize_together(writers: Sequence[BinidxWriter]) -> None:
    """Put pairs that belong together in place: no old .idx is left when the first new one appears."""
    try:
        for writer in writers:
            writer.prepare()
        for writer in writers:
            writer.remove_old_index()
        for writer in writers:
            writer.replace_old_pair()
    except BaseException:
        for writer in writers:
            writer.abort()
        raise


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
