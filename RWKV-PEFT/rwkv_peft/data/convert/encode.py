"""Chunks of raw records to token ids: what a conversion does in parallel."""

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

from rwkv_peft.data.convert.records import Layout, Segment, check_characters, decode, parse
from rwkv_peft.data.convert.sources import Chunk
from rwkv_peft.data.rows.held_out import HoldOut
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_peft.errors import BadRecord, DataError

_FLUSH = 4096
"""Ids that are gathered before they become an array: fewer calls for short documents, and still in the cache."""
_WAITING = 3
"""Chunks for each worker that are read ahead of it."""


@dataclass
class Encoded:
    """Documents of one pair, as BinidxWriter.add_encoded takes them."""

    tokens: bytes = b""
    sizes: Sequence[int] = ()
    mask: bytes | None = None
    """None: everything trains."""


@dataclass
class Reject:
    number: int
    """Line or row."""
    problem: BadRecord
    raw: bytes


@dataclass
class EncodedChunk:
    train: Encoded
    val: Encoded
    rejects: list[Reject] = field(default_factory=list)


class ChunkEncoder:
    """Turns chunks into documents; one in each process.

    Args:
        val_fraction: share of the documents that go to the second pair, chosen by a hash of their text.
    """

    def __init__(self, tokenizer: Tokenizer, layout: Layout, val_fraction: float) -> None:
        self._tokenizer, self._layout = tokenizer, layout
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")
        self._hold_out = HoldOut(val_fraction)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        train, val = _Documents(self._tokenizer, self._dtype), _Documents(self._tokenizer, self._dtype)
        rejects = []
        for number, raw in zip(chunk.numbers, chunk.raws, strict=True):
            try:
                segments = _text_segments(raw, chunk) if chunk.is_text else self._layout.segments(parse(raw))
            except BadRecord as problem:
                rejects.append(Reject(number + problem.lines_down, problem, raw))
                continue
            (val if self._hold_out and self._is_val(segments) else train).add(segments, ended=chunk.last)
        return EncodedChunk(train.encoded(), val.encoded(), rejects)

    def _is_val(self, segments: Iterable[Segment]) -> bool:
        return self._hold_out("".join(text for text, _ in segments).encode("utf-8"))


def _text_segments(raw: bytes, chunk: Chunk) -> list[Segment]:
    if not raw and chunk.first:
        raise BadRecord("is empty", hint="Remove the file.")
    text = decode(raw)
    check_characters(text)
    return [(text, True)] if text else []


def pack_ids(ids: list[int], dtype: np.dtype) -> bytes:
    """The ids as they stand in a .bin. By way of unsigned integers of 32 bits: Python fills an array of those twice as
    fast as any of 16, or numpy one of either.

    Raises:
        OverflowError: an id does not fit, which would come out as another one.
    """
    wide = np.frombuffer(array("I", ids), np.uint32)
    if len(wide) and wide.max() > np.iinfo(dtype).max:
        raise OverflowError(f"id {wide.max()} does not fit {dtype.name}")
    return wide.astype(dtype).tobytes()


class _Documents:
    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._encode, self._eod, self._dtype = tokenizer.encode, tokenizer.eod, dtype
        self._ids: list[int] = []
        self._blocks: list[bytes] = []
        self._mask: list[bytes] = []
        self._masked = False
        self._sizes: list[int] = []

    def add(self, segments: Sequence[Segment], *, ended: bool) -> None:
        """Each segment is encoded by itself: no token lies across a border. eod trains where the last one does."""
        size = 0
        trains = True
        for text, trains in segments:
            ids = self._encode(text)
            self._ids += ids
            self._mask.append((b"\1" if trains else b"\0") * len(ids))
            self._masked |= not trains
            size += len(ids)
        if ended:
            self._ids.append(self._eod)
            self._mask.append(b"\1" if trains else b"\0")
            size += 1
        self._sizes.append(size)
        if len(self._ids) > _FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._blocks.append(pack_ids(self._ids, self._dtype))
        self._ids = []

    def encoded(self) -> Encoded:
        self._flush()
        return Encoded(b"".join(self._blocks), self._sizes, b"".join(self._mask) if self._masked else None)


def encode_all(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, layout: Layout, val_fraction: float, workers: int
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Each chunk and its documents, in order. Only a few chunks are in memory at any time.

    Raises:
        DataError: a worker was killed, as by a system that runs out of memory.
    """
    if workers == 1:
        encoder = ChunkEncoder(tokenizer, layout, val_fraction)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # forking a process that has threads can hang
        initializer=_start_worker,
        initargs=(tokenizer.spec, layout, val_fraction),
    )
    waiting: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    done = False
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(waiting) > _WAITING * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
        done = True
    finally:
        pool.shutdown(wait=done, cancel_futures=True)


def _finished(chunk: Chunk, future: Future[EncodedChunk]) -> tuple[Chunk, EncodedChunk]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        hint = "It may have run out of memory: try fewer --workers."
        raise DataError(chunk.path, "a worker process died", hint=hint) from error


_worker: list[ChunkEncoder] = []
"""The encoder of this process, where it is a worker."""


def _start_worker(tokenizer_spec: str, layout: Layout, val_fraction: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [ChunkEncoder(load_tokenizer(tokenizer_spec), layout, val_fraction)]


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    return _worker[0].encode(chunk)
