"""Encodes chunks of raw records to token ids: the parallel part of a conversion."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from rwkv_peft.data.convert.record_text import RecordFormat, Segment, check_characters, decode, parse
from rwkv_peft.data.convert.sources import Chunk
from rwkv_peft.data.rows.validation_split import ValidationSplit
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_peft.errors import BadRecord, DataError

_FLUSH_FROM = 4096
"""Ids to collect before they become an array: fewer calls for short documents, and they still fit the CPU cache."""
_CHUNKS_AHEAD = 3
"""Chunks to read ahead for each worker."""


@dataclass
class Encoded:
    """Documents of one pair, as BinidxWriter.add_encoded takes them."""

    tokens: bytes = b""
    sizes: Sequence[int] = ()
    mask: bytes | None = None
    """One byte for each token; None if all are trained."""


@dataclass
class Reject:
    """An invalid record."""

    number: int
    """Line or row."""
    error: BadRecord
    record: bytes


@dataclass
class EncodedChunk:
    """Documents of a chunk, and its invalid records."""

    train: Encoded
    val: Encoded
    rejects: list[Reject] = field(default_factory=list)


class ChunkEncoder:
    """Encodes chunks; each process has one.

    Args:
        tokenizer: makes the ids.
        record_format: how to read records.
        val_fraction: fraction of the documents for the validation pair; a hash of the text chooses them.
    """

    def __init__(self, tokenizer: Tokenizer, record_format: RecordFormat, val_fraction: float) -> None:
        self._tokenizer, self._format = tokenizer, record_format
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")
        self._split = ValidationSplit(val_fraction)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        train, val = _Documents(self._tokenizer, self._dtype), _Documents(self._tokenizer, self._dtype)
        rejects = []
        for number, record in zip(chunk.numbers, chunk.records, strict=True):
            try:
                segments = _text_segments(record, chunk) if chunk.is_text else self._format.segments(parse(record))
            except BadRecord as error:
                rejects.append(Reject(number + error.line_offset, error, record))
                continue
            (val if self._split and self._is_val(segments) else train).add(segments, complete=chunk.last)
        return EncodedChunk(train.encoded(), val.encoded(), rejects)

    def _is_val(self, segments: Iterable[Segment]) -> bool:
        return self._split.is_validation("".join(text for text, _ in segments).encode("utf-8"))


def _text_segments(piece: bytes, chunk: Chunk) -> list[Segment]:
    if not piece and chunk.first:
        raise BadRecord("is empty", hint="Remove the file.")
    text = decode(piece)
    check_characters(text)
    return [(text, True)] if text else []


def pack_ids(ids: list[int], dtype: np.dtype) -> bytes:
    """Return ids as the bytes of a .bin.

    The ids become unsigned 32-bit integers first: Python fills such an array twice as fast as one of 16 bits, or as
    numpy does.

    Raises:
        OverflowError: an id does not fit the dtype.
    """
    wide = np.frombuffer(array("I", ids), np.uint32)
    if len(wide) and wide.max() > np.iinfo(dtype).max:
        raise OverflowError(f"id {wide.max()} does not fit {dtype.name}")
    return wide.astype(dtype).tobytes()


class _Documents:
    """Collects encoded documents."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._encode, self._eod, self._dtype = tokenizer.encode, tokenizer.eod, dtype
        self._ids: list[int] = []
        self._blocks: list[bytes] = []
        self._mask: list[bytes] = []
        self._masked = False
        self._sizes: list[int] = []

    def add(self, segments: Sequence[Segment], *, complete: bool) -> None:
        """Append a document. Segments are encoded separately, so no token spans two of them.

        A complete document ends with eod, which is trained if the last segment is.
        """
        size = 0
        trained = True
        for text, trained in segments:
            ids = self._encode(text)
            self._ids += ids
            self._mask.append((b"\1" if trained else b"\0") * len(ids))
            self._masked |= not trained
            size += len(ids)
        if complete:
            self._ids.append(self._eod)
            self._mask.append(b"\1" if trained else b"\0")
            size += 1
        self._sizes.append(size)
        if len(self._ids) > _FLUSH_FROM:
            self._flush()

    def _flush(self) -> None:
        self._blocks.append(pack_ids(self._ids, self._dtype))
        self._ids = []

    def encoded(self) -> Encoded:
        self._flush()
        return Encoded(b"".join(self._blocks), self._sizes, b"".join(self._mask) if self._masked else None)


def encode_all(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, record_format: RecordFormat, val_fraction: float, workers: int
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Yield each chunk with its documents, in order. Only a few chunks are in memory at any time.

    Raises:
        DataError: a worker was killed, for example because the system ran out of memory.
    """
    if workers == 1:
        encoder = ChunkEncoder(tokenizer, record_format, val_fraction)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # forking a process with threads can hang
        initializer=_start_worker,
        initargs=(tokenizer.spec, record_format, val_fraction),
    )
    waiting: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    done = False
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(waiting) > _CHUNKS_AHEAD * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
        done = True
    finally:
        pool.shutdown(wait=done, cancel_futures=True)


def _result(chunk: Chunk, future: Future[EncodedChunk]) -> tuple[Chunk, EncodedChunk]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        hint = "The system may have run out of memory. Use fewer --workers with rwkv-peft convert."
        raise DataError(chunk.path, "a worker process died", hint=hint) from error


_worker: list[ChunkEncoder] = []
"""The encoder of this process if it is a worker."""


def _start_worker(tokenizer_spec: str, record_format: RecordFormat, val_fraction: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [ChunkEncoder(load_tokenizer(tokenizer_spec), record_format, val_fraction)]


def _end_with_parent() -> None:
    """End this worker if the parent is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    return _worker[0].encode(chunk)
