"""Text to a binidx pair: the work behind tools/json2binidx.py.

sources.py    files, folders, standard input -> chunks of raw records, each with its file and line
records.py    a raw record -> segments of text that train or do not
encode.py     segments -> ids and mask, in parallel, and in the order of the input
here          the pair, its validation half, rejects, the bar and the summary
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter, finalize_together
from rwkv_peft.data.convert.encode import EncodedChunk, Reject, encode_all
from rwkv_peft.data.convert.records import Layout
from rwkv_peft.data.convert.sources import Chunk, find_sources, read_chunks, total_size
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.temporary import remove_leftovers, temporary

VAL_SUFFIX = "_val"
_WORTH_WORKERS = 16 * 2**20
"""Bytes of input from which starting processes pays."""


@dataclass(frozen=True)
class Options:
    val_fraction: float = 0.0
    """Share of the documents that go to PREFIX_val; 0 writes no second pair."""
    workers: int = 0
    """Processes; 0 takes one for each core when the input is large, else none but this one."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop: the first bad record ends the run and nothing is written. skip: it goes to PREFIX.rejects.jsonl."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    lengths: np.ndarray
    """Tokens of each document of both pairs, (documents,), its eod included."""
    val_documents: int
    answer_tokens: int | None
    """Tokens that train; None where all do."""
    rejects: int
    bytes_read: int
    """Of text, uncompressed."""
    seconds: float
    files: tuple[str, ...]

    def report(self, ctx_len: int) -> str:
        documents, tokens = len(self.lengths), int(self.lengths.sum(dtype=np.int64))
        median, p90, p99, longest = np.percentile(self.lengths, (50, 90, 99, 100), method="inverted_cdf")
        over = int((self.lengths > ctx_len).sum())
        megabytes = self.bytes_read / 1e6
        lines = [
            f"documents  {documents:,}" + (f" ({self.val_documents:,} for validation)" if self.val_documents else ""),
            f"tokens     {tokens:,} ({self.bytes_read / tokens:.2f} bytes read for each)",
            f"lengths    median {median:,}  90% {p90:,}  99% {p99:,}  longest {longest:,} tokens",
            f"too long   {over:,} documents ({over / documents:.1%}) are over ctx_len {ctx_len:,}",
            f"read       {megabytes:,.1f} MB in {self.seconds:.1f} s ({megabytes / self.seconds:.1f} MB/s)",
            f"wrote      {'  '.join(self.files)}",
        ]
        if self.answer_tokens is not None:
            lines.insert(2, f"answers    {self.answer_tokens:,} tokens train ({self.answer_tokens / tokens:.1%})")
        if self.rejects:
            lines.insert(-2, f"rejects    {self.rejects:,}, see the .rejects.jsonl")
        return "\n".join(lines)


def convert(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    layout: Layout | None = None,
    options: Options | None = None,
) -> Summary:
    """Tokenise records into OUTPUT_PREFIX.bin, .idx and .meta.json, and .mask.bin where they say what is an answer.

    Raises:
        DataError: a file cannot be read or written, there is no document, or a record is bad: the error names file and
            line. Nothing is written then, and an older pair of that name stays as it was.
    """
    started = time.perf_counter()
    layout, options = layout or Layout(), options or Options()
    paths = find_sources(inputs)
    with _disk_errors(output_prefix), ExitStack() as stack:
        for prefix in (output_prefix, output_prefix + VAL_SUFFIX):
            remove_leftovers(prefix)
        outputs = _Outputs(stack, output_prefix, tokenizer, options)
        encoded = encode_all(
            read_chunks(paths), tokenizer, layout, options.val_fraction, options.workers or _auto_workers(paths)
        )
        stack.enter_context(closing(encoded))  # its workers end here, not when Python gets around to it
        for chunk, documents in _with_bar(encoded, total_size(paths), outputs):
            outputs.add(chunk, documents)
        outputs.finalize(" ".join(inputs))
    return outputs.summary(time.perf_counter() - started)


def _auto_workers(paths: Sequence[str]) -> int:
    size = total_size(paths)
    if size is not None and size < _WORTH_WORKERS:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on a Mac


@contextmanager
def _disk_errors(output_prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = str(error.filename or output_prefix)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Nothing was written. Free some space, or name a place with more in --output_prefix."
            raise DataError(where, "no space left to write", found=error.strerror, hint=hint) from error
        raise DataError(where, "cannot be read or written", found=error.strerror) from error


def _with_bar(
    encoded: Iterator[tuple[Chunk, EncodedChunk]], size: int | None, outputs: _Outputs
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Under a progress bar on a terminal (`disable=None`): share, MB/s, time left, tokens."""
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for chunk, documents in encoded:
            yield chunk, documents
            if not bar.disable:
                bar.set_postfix_str(f"{outputs.tokens:,} tokens", refresh=False)
            bar.update(chunk.consumed)


class _Outputs:
    """The pair, its validation pair, and the rejects; nothing appears before `finalize`."""

    def __init__(self, stack: ExitStack, prefix: str, tokenizer: Tokenizer, options: Options) -> None:
        self._prefix, self._options = prefix, options
        self._train = BinidxWriter(prefix, tokenizer)
        stack.callback(self._train.abort)  # does nothing once the pair is in place
        self._val = BinidxWriter(prefix + VAL_SUFFIX, tokenizer, held_out=True) if options.val_fraction else None
        if self._val is not None:
            stack.callback(self._val.abort)
        self._rejects = _RejectFile(prefix)
        stack.callback(self._rejects.abort)
        self._open: BinidxWriter | None = None
        self._text_is_bad = False
        self._bytes = self._answer_tokens = 0
        self.tokens = 0

    @property
    def _writers(self) -> list[BinidxWriter]:
        return [self._train] if self._val is None else [self._train, self._val]

    def add(self, chunk: Chunk, documents: EncodedChunk) -> None:
        self._bytes += sum(map(len, chunk.raws))
        for reject in documents.rejects:
            self._reject(chunk, reject)
        if chunk.damage is not None:
            self._drop_unfinished()
            self._reject(chunk, Reject(chunk.damage_at, chunk.damage, b""))
        if chunk.is_text:
            self._add_text(chunk, documents)
            return
        for writer, encoded in zip(self._writers, (documents.train, documents.val), strict=False):
            self._add_to(writer, encoded)

    def _add_text(self, chunk: Chunk, documents: EncodedChunk) -> None:
        """A text may come in pieces: all go where the first one went, or nowhere when one is bad."""
        is_val = bool(documents.val.sizes)
        if chunk.first:
            self._open = self._val if is_val else self._train
            self._text_is_bad = False
        self._text_is_bad |= bool(documents.rejects)
        writer = self._open or self._train
        if self._text_is_bad:
            self._drop_unfinished()
        else:
            self._add_to(writer, documents.val if is_val else documents.train, goes_on=not chunk.last)

    def _add_to(self, writer: BinidxWriter, encoded: Any, goes_on: bool = False) -> None:
        writer.add_encoded(encoded.tokens, encoded.sizes, encoded.mask, goes_on=goes_on)
        count = sum(encoded.sizes)
        self.tokens += count
        self._answer_tokens += count if encoded.mask is None else encoded.mask.count(1)

    def _drop_unfinished(self) -> None:
        for writer in self._writers:
            dropped = writer.drop_unfinished()
            self.tokens -= dropped
            self._answer_tokens -= dropped

    def _reject(self, chunk: Chunk, reject: Reject) -> None:
        if self._options.on_error == "stop":
            raise reject.problem.at(chunk.place(reject.number))
        self._rejects.add(chunk, reject)

    def finalize(self, inputs: str) -> None:
        if not any(len(writer.sizes) for writer in self._writers):
            rejected = f"{self._rejects.count:,} rejected" if self._rejects.count else None
            raise DataError(inputs, "no documents", found=rejected, expected="one record at least")
        for writer, name in zip(self._writers, ("training", "validation"), strict=False):
            if not len(writer.sizes):
                hint = "Change --val_fraction, or give more documents."
                raise DataError("--val_fraction", f"no document is left for {name}", hint=hint)
        if any(writer.has_mask for writer in self._writers):
            for writer in self._writers:
                writer.begin_mask()
        self._rejects.prepare()
        finalize_together(self._writers, obsolete=[] if self._val else _old_half(self._prefix + VAL_SUFFIX))
        self._rejects.replace()

    def summary(self, seconds: float) -> Summary:
        suffixes = [".bin", ".idx", ".meta.json", *([".mask.bin"] if self._train.has_mask else [])]
        files = [writer.prefix + suffix for writer in self._writers for suffix in suffixes]
        if self._rejects.count:
            files.append(str(self._rejects.path))
        return Summary(
            lengths=np.concatenate([writer.sizes for writer in self._writers]),
            val_documents=len(self._val.sizes) if self._val is not None else 0,
            answer_tokens=self._answer_tokens if self._train.has_mask else None,
            rejects=self._rejects.count,
            bytes_read=self._bytes,
            seconds=seconds,
            files=tuple(files),
        )


def _old_half(prefix: str) -> list[str]:
    """The prefix, where the validation half of an older pair lies there: the new pair trains on what it held out."""
    try:
        meta = BinidxReader(prefix).meta
    except DataError:  # none, or nothing that can be read as one
        return []
    return [prefix] if meta is not None and meta.held_out else []


class _RejectFile:
    """PREFIX.rejects.jsonl: file, line (or row), reason and the record as it was. A run without any removes it."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(prefix + ".rejects.jsonl")
        self.count = 0
        self._temporary = temporary(self.path)
        self._file = open(self._temporary, "w", encoding="utf-8")  # noqa: SIM115  closed by prepare or abort

    def add(self, chunk: Chunk, reject: Reject) -> None:
        record = reject.raw.decode("utf-8", "replace").rstrip("\n")
        number = "row" if chunk.unit else "line"
        entry = {"file": chunk.path, number: reject.number, "reason": reject.problem.reason, "record": record}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.count += 1

    def prepare(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def replace(self) -> None:
        if self.count:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink()
            self.path.unlink(missing_ok=True)

    def abort(self) -> None:
        with suppress(OSError):  # on a full disk closing fails again, for what is still buffered
            self._file.close()
        self._temporary.unlink(missing_ok=True)
