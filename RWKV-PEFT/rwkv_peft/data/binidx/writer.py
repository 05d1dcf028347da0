"""Token files, written: whole or not at all. `binidx.py` has their format."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from rwkv_peft.data.binidx.reader import HEADER, MAGIC, META_VERSION, SUFFIXES, VERSION, BinidxMeta
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.files import sync_folder
from rwkv_peft.temporary import temporary


class BinidxWriter:
    """Writes a pair and its sidecar, a document at a time; as a context manager it finalizes, or aborts on an error.

    Everything goes to temporary files beside the target. Only when they are whole and on disk does the old .idx go,
    and the new one comes last: a reader finds the old pair, the new pair, or no .idx, never halves of two pairs.

    Args:
        prefix: path without suffix; its folder is made.
        tokenizer: decides the dtype (uint16 while the vocabulary fits, else int32) and goes into the sidecar.
        with_mask: write PREFIX.mask.bin. The first document that comes with a mask asks for it too; what is added
            without one trains everywhere. A pair without a mask removes the .mask.bin of an older pair.
        held_out: the sidecar says that this is another pair's validation half.
    Raises:
        OSError: as the file system gives it.
    """

    def __init__(
        self, prefix: str | Path, tokenizer: Tokenizer, with_mask: bool = False, held_out: bool = False
    ) -> None:
        self.prefix = str(prefix)
        self._tokenizer, self._held_out = tokenizer, held_out
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
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def remove_old_index(self) -> None:
        Path(self.prefix + ".idx").unlink(missing_ok=True)

    def replace_old_pair(self) -> None:
        for suffix in SUFFIXES:
            sync_folder(self._folder)  # the order on disk must be the order here
            if suffix == ".mask.bin" and self._mask is None:
                Path(self.prefix + suffix).unlink(missing_ok=True)
            else:
                self._temporary(suffix).replace(self.prefix + suffix)
        sync_folder(self._folder)

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
            held_out=self._held_out,
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
        return temporary(self.prefix + suffix)


def finalize_together(writers: Sequence[BinidxWriter], obsolete: Sequence[str] = ()) -> None:
    """Put pairs that belong together in place: no old .idx is left when the first new one appears.

    Args:
        obsolete: prefixes of old pairs that go, with nothing in their place.
    """
    try:
        for writer in writers:
            writer.prepare()
        for writer in writers:
            writer.remove_old_index()
        for prefix, suffix in product(obsolete, reversed(SUFFIXES)):
            Path(prefix + suffix).unlink(missing_ok=True)
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
