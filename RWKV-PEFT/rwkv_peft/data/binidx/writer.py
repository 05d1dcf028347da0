"""Writes token files, completely or not at all. reader.py describes the format."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from rwkv_peft.data.binidx.reader import HEADER, MAGIC, META_VERSION, SUFFIXES, VERSION, BinidxMeta
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.files import AtomicFile, sync_folder


class BinidxWriter:
    """Writes a pair and its sidecar, document by document. As a context manager it finalizes, or aborts on an error.

    All files are written as temporary files and flushed. Then the old .idx is deleted, the new files are renamed, and
    the new .idx comes last. A reader finds the old pair, the new pair, or no .idx, but never a mixture of two pairs.

    Args:
        prefix: path without suffix. Its folder is created.
        tokenizer: decides the dtype (uint16 if the vocabulary fits, else int32) and is named in the sidecar.
        with_mask: write PREFIX.mask.bin. Without this, the first document that has a mask starts it. Documents without
            a mask are trained in full. A pair without a mask deletes the .mask.bin of an older pair.
        is_validation: the sidecar says that this is the validation half of another pair.
    Raises:
        OSError: from any method, as the file system reports it.
    """

    def __init__(
        self, prefix: str | Path, tokenizer: Tokenizer, with_mask: bool = False, is_validation: bool = False
    ) -> None:
        self.prefix = str(prefix)
        self._tokenizer, self._is_validation = tokenizer, is_validation
        self._code, self._typecode = (8, "H") if tokenizer.vocab_size <= 2**16 else (4, "i")
        self._sizes = array("i")
        self._last_is_partial = False
        self._files: dict[str, AtomicFile] = {}
        self._bin = self._create(".bin")
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
        """Append one document.

        Args:
            ids: token ids below the tokenizer's vocab_size. The last one is eod.
            mask: for each id, 1 if predicting it is trained, else 0. None: all are trained.
        Raises:
            OverflowError: an id does not fit the dtype.
            ValueError: the mask has the wrong length or a value other than 0 and 1.
        """
        tokens = array(self._typecode, ids)  # as fast as numpy for lists, and never wraps an id that is too large
        self.add_encoded(tokens.tobytes(), (len(tokens),), None if mask is None else bytes(mask))

    def add_encoded(
        self, tokens: bytes, sizes: Sequence[int], mask: bytes | None = None, *, last_is_partial: bool = False
    ) -> None:
        """Append documents whose ids are already bytes of the file's dtype.

        Args:
            tokens: ids of all documents, one after another.
            sizes: tokens of each document.
            mask: one byte, 0 or 1, for each token. None: all are trained.
            last_is_partial: the last document is incomplete; the next call continues it.
        """
        count = sum(sizes)
        if len(tokens) != count * self._itemsize:
            raise ValueError(f"{len(tokens)} bytes for {count} tokens of {self._itemsize} bytes")
        if mask is not None and (len(mask) != count or mask.strip(b"\0\1")):
            raise ValueError(f"a mask of {len(mask)} values for {count} tokens, or with values other than 0 and 1")
        if mask is not None:
            self.begin_mask()
        self._bin.write(tokens)
        if self._mask is not None:
            self._mask.write(b"\1" * count if mask is None else mask)
        if self._last_is_partial and sizes:
            self._sizes[-1] += sizes[0]
            sizes = sizes[1:]
        self._sizes.extend(sizes)
        self._last_is_partial = last_is_partial

    def drop_partial(self) -> int:
        """Remove the last document if it is incomplete, and return the number of removed tokens."""
        if not self._last_is_partial:
            return 0
        dropped = self._sizes.pop()
        self._last_is_partial = False
        for file, itemsize in ((self._bin, self._itemsize), (self._mask, 1)):
            if file is not None:
                file.seek(-dropped * itemsize, os.SEEK_CUR)
                file.truncate()
        return dropped

    def begin_mask(self) -> None:
        """Start the mask if there is none. The tokens so far are trained."""
        if self._mask is None:
            self._mask = self._create(".mask.bin")
            remaining = int(self.sizes.sum(dtype=np.int64))
            while remaining:
                remaining -= self._mask.write(b"\1" * min(remaining, 2**20))

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document so far, (documents,) int32."""
        return np.array(self._sizes, dtype=np.int32)

    def finalize(self) -> None:
        """Put the pair in place. Does nothing after an earlier `finalize` or `abort`."""
        if not self._bin.closed:
            finalize_together([self])

    def prepare(self) -> None:
        """Flush the complete pair to the disk, still in temporary files. Nothing can be added afterwards."""
        self._bin.close()
        if self._mask is not None:
            self._mask.close()
        for suffix, content in ((".meta.json", self._meta_bytes()), (".idx", self._index_bytes())):
            with self._create(suffix) as file:
                file.write(content)
        for file in self._files.values():
            file.sync()

    def abort(self) -> None:
        """Delete the temporary files. An old pair is unchanged."""
        for file in (self._bin, self._mask):
            if file is not None:
                with suppress(OSError):  # on a full disk, closing fails again because of the buffered data
                    file.close()
        for file in self._files.values():
            file.discard()

    def remove_old_index(self) -> None:
        """Delete the .idx of an old pair, so that no reader sees a mixture of two pairs."""
        Path(self.prefix + ".idx").unlink(missing_ok=True)

    def replace_old_pair(self) -> None:
        """Rename the temporary files, the .idx last."""
        folder = Path(self.prefix).parent
        sync_folder(folder)  # the removal of the old index must reach the disk first
        for suffix in SUFFIXES:
            if suffix in self._files:
                self._files[suffix].replace()
            else:
                Path(self.prefix + suffix).unlink(missing_ok=True)
                sync_folder(folder)

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
            is_validation=self._is_validation,
        )
        return (json.dumps(meta.as_json(), indent=2, ensure_ascii=False) + "\n").encode("utf-8")

    def _create(self, suffix: str) -> BinaryIO:
        self._files[suffix] = AtomicFile(self.prefix + suffix)
        return open(self._files[suffix].temporary, "wb")

    @property
    def _itemsize(self) -> int:
        return array(self._typecode).itemsize


def finalize_together(writers: Sequence[BinidxWriter], obsolete: Sequence[str] = ()) -> None:
    """Put pairs that belong together in place. All old .idx files are deleted before the first new one appears.

    Args:
        writers: the pairs.
        obsolete: prefixes of old pairs to delete.
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
