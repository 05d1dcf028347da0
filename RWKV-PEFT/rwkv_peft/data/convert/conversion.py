"""Converts text to a binidx pair. tools/json2binidx.py is its command line.

sources.py      files, folders, standard input -> chunks of raw records with file and line
record_text.py  a raw record -> segments of text, trained or not
encode.py       segments -> token ids and loss mask, in parallel, in the order of the input
this file       the pair, the validation pair, rejected records, progress bar and summary
"""

from __future__ import annotations

import errno
import glob
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.binidx.writer import BinidxWriter, finalize_together
from rwkv_peft.data.convert.encode import Encoded, EncodedChunk, Reject, encode_all
from rwkv_peft.data.convert.record_text import RecordFormat
from rwkv_peft.data.convert.sources import Chunk, find_sources, read_chunks, total_size
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.files import AtomicFile, remove_leftovers

VAL_SUFFIX = "_val"
_PARALLEL_FROM = 16 * 2**20
"""Bytes of input from which worker processes are faster."""


@dataclass(frozen=True)
class Options:
    """Options of a conversion."""

    val_fraction: float = 0.0
    """Fraction of the documents that go to the validation pair PREFIX_val; 0 writes no such pair."""
    workers: int = 0
    """Processes; 0 uses one per core if the input is large, else one."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop: the first invalid record is an error and nothing is written. skip: it goes to PREFIX.rejects.jsonl."""


@dataclass(frozen=True)
class Summary:
    """The result of a conversion."""

    lengths: np.ndarray
    """Tokens of each document of both pairs, eod included: (documents,)."""
    val_documents: int
    answer_tokens: int | None
    """Trained tokens; None if all are trained."""
    rejects: int
    bytes_read: int
    """Size of the records, uncompressed."""
    seconds: float
    files: tuple[str, ...]
    """The written files."""

    def report(self, ctx_len: int) -> str:
        """Return the lines to print; they count the documents longer than `ctx_len` tokens."""
        documents, tokens = len(self.lengths), int(self.lengths.sum(dtype=np.int64))
        marks = np.percentile(self.lengths, (50, 90, 99, 100), method="inverted_cdf")
        names = ("median", "90th percentile", "99th percentile", "longest")
        lengths = ", ".join(f"{name} {mark:,}" for name, mark in zip(names, marks, strict=True))
        over = int((self.lengths > ctx_len).sum())
        megabytes = self.bytes_read / 1e6
        lines = [
            f"documents  {documents:,}" + (f" ({self.val_documents:,} for validation)" if self.val_documents else ""),
            f"tokens     {tokens:,} ({self.bytes_read / tokens:.2f} bytes per token)",
            f"lengths    {lengths} tokens",
            f"too long   {over:,} documents ({over / documents:.1%}) are longer than ctx_len {ctx_len:,}",
            f"read       {megabytes:,.1f} MB in {self.seconds:.1f} s ({megabytes / self.seconds:.1f} MB/s)",
            f"wrote      {'  '.join(self.files)}",
        ]
        if self.answer_tokens is not None:
            lines.insert(
                2, f"answers    {self.answer_tokens:,} tokens are in the loss ({self.answer_tokens / tokens:.1%})"
            )
        if self.rejects:
            lines.insert(-2, f"rejects    {self.rejects:,} (see the .rejects.jsonl)")
        return "\n".join(lines)


def convert(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    record_format: RecordFormat | None = None,
    options: Options | None = None,
) -> Summary:
    """Tokenize records into OUTPUT_PREFIX.bin, .idx and .meta.json, and .mask.bin if the records have answers.

    Args:
        inputs: files, folders, glob patterns, or `-` for standard input.
        output_prefix: path without suffix.
        tokenizer: makes the ids.
        record_format: how to read records. None recognizes them by their keys.
        options: None takes the defaults.
    Raises:
        DataError: a file cannot be read or written, there is no document, or a record is invalid (the error names its
            file and line). Then nothing is written, and an older pair of that name is unchanged.
    """
    started = time.perf_counter()
    record_format, options = record_format or RecordFormat(), options or Options()
    paths = find_sources(inputs)
    with _disk_errors(output_prefix), ExitStack() as stack:
        for prefix in (Path(output_prefix), Path(output_prefix + VAL_SUFFIX)):
            remove_leftovers(prefix.parent, f"{glob.escape(prefix.name)}.*")
        outputs = _Outputs(stack, output_prefix, tokenizer, options)
        encoded = encode_all(
            read_chunks(paths), tokenizer, record_format, options.val_fraction, options.workers or _auto_workers(paths)
        )
        stack.enter_context(closing(encoded))  # ends its workers here, not at garbage collection
        for chunk, documents in _with_progress_bar(encoded, total_size(paths), outputs):
            outputs.add(chunk, documents)
        outputs.finalize(" ".join(inputs))
    return outputs.summary(time.perf_counter() - started)


def _auto_workers(paths: Sequence[str]) -> int:
    size = total_size(paths)
    if size is not None and size < _PARALLEL_FROM:
        return 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _disk_errors(output_prefix: str) -> Iterator[None]:
    """Turn OSErrors into one line."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or output_prefix)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "Nothing was written. Free some space, or choose an --output_prefix on another disk."
            raise DataError(where, "the disk is full", found=error.strerror, hint=hint) from error
        raise DataError(where, "cannot be read or written", found=error.strerror) from error


def _with_progress_bar(
    encoded: Iterator[tuple[Chunk, EncodedChunk]], size: int | None, outputs: _Outputs
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Show percentage, MB/s, time left and tokens, if stderr is a terminal (`disable=None`)."""
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for chunk, documents in encoded:
            yield chunk, documents
            if not bar.disable:
                bar.set_postfix_str(f"{outputs.tokens:,} tokens", refresh=False)
            bar.update(chunk.bytes_read)


class _Outputs:
    """The pair, its validation pair and the rejected records. No file appears before `finalize`."""

    def __init__(self, stack: ExitStack, prefix: str, tokenizer: Tokenizer, options: Options) -> None:
        self._prefix, self._options = prefix, options
        self._train = BinidxWriter(prefix, tokenizer)
        stack.callback(self._train.abort)  # does nothing after `finalize`
        self._val = BinidxWriter(prefix + VAL_SUFFIX, tokenizer, is_validation=True) if options.val_fraction else None
        if self._val is not None:
            stack.callback(self._val.abort)
        self._rejects = _RejectFile(prefix)
        stack.callback(self._rejects.abort)
        self._open: BinidxWriter | None = None
        self._text_is_invalid = False
        self._bytes = self._answer_tokens = 0
        self.tokens = 0

    @property
    def _writers(self) -> list[BinidxWriter]:
        return [self._train] if self._val is None else [self._train, self._val]

    def add(self, chunk: Chunk, documents: EncodedChunk) -> None:
        """Append a chunk's documents and its rejected records."""
        self._bytes += sum(map(len, chunk.records))
        for reject in documents.rejects:
            self._reject(chunk, reject)
        if chunk.damage is not None:
            self._drop_partial()
            self._reject(chunk, Reject(chunk.damage_at, chunk.damage, b""))
        if chunk.is_text:
            self._add_text(chunk, documents)
            return
        for writer, encoded in zip(self._writers, (documents.train, documents.val), strict=False):
            self._add_to(writer, encoded)

    def _add_text(self, chunk: Chunk, documents: EncodedChunk) -> None:
        """Append a text, or a piece of one: all pieces go where the first one went, or nowhere if one is invalid."""
        is_val = bool(documents.val.sizes)
        if chunk.first:
            self._open = self._val if is_val else self._train
            self._text_is_invalid = False
        self._text_is_invalid |= bool(documents.rejects)
        writer = self._open or self._train
        if self._text_is_invalid:
            self._drop_partial()
        else:
            self._add_to(writer, documents.val if is_val else documents.train, last_is_partial=not chunk.last)

    def _add_to(self, writer: BinidxWriter, encoded: Encoded, last_is_partial: bool = False) -> None:
        writer.add_encoded(encoded.tokens, encoded.sizes, encoded.mask, last_is_partial=last_is_partial)
        count = sum(encoded.sizes)
        self.tokens += count
        self._answer_tokens += count if encoded.mask is None else encoded.mask.count(1)

    def _drop_partial(self) -> None:
        for writer in self._writers:
            dropped = writer.drop_partial()
            self.tokens -= dropped
            self._answer_tokens -= dropped

    def _reject(self, chunk: Chunk, reject: Reject) -> None:
        if self._options.on_error == "stop":
            raise reject.error.at(chunk.place(reject.number))
        self._rejects.add(chunk, reject)

    def finalize(self, inputs: str) -> None:
        """Put all files in place; `inputs` names the input in errors."""
        if not any(len(writer.sizes) for writer in self._writers):
            rejected = f"{self._rejects.count:,} rejected" if self._rejects.count else None
            raise DataError(inputs, "no documents", found=rejected, expected="at least one valid record")
        for writer, name in zip(self._writers, ("training", "validation"), strict=False):
            if not len(writer.sizes):
                hint = "Change --val_fraction, or add documents."
                raise DataError("--val_fraction", f"no document is left for {name}", hint=hint)
        if any(writer.has_mask for writer in self._writers):
            for writer in self._writers:
                writer.begin_mask()
        self._rejects.prepare()
        finalize_together(self._writers, obsolete=[] if self._val else _old_validation_pair(self._prefix + VAL_SUFFIX))
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


def _old_validation_pair(prefix: str) -> list[str]:
    """Return [prefix] if an older conversion wrote a validation pair there, which the new training pair includes."""
    try:
        meta = BinidxReader(prefix).meta
    except DataError:  # no pair, or not a readable one
        return []
    return [prefix] if meta is not None and meta.is_validation else []


class _RejectFile:
    """PREFIX.rejects.jsonl: file, line (or row), reason and original text of each rejected record.

    A conversion without rejected records deletes an older file.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(prefix + ".rejects.jsonl")
        self.count = 0
        self._target = AtomicFile(self.path)
        self._file = open(self._target.temporary, "w", encoding="utf-8")  # noqa: SIM115  closed by prepare or abort

    def add(self, chunk: Chunk, reject: Reject) -> None:
        record = reject.record.decode("utf-8", "replace").rstrip("\n")
        number = "row" if chunk.unit else "line"
        entry = {"file": chunk.path, number: reject.number, "reason": reject.error.reason, "record": record}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.count += 1

    def prepare(self) -> None:
        self._file.close()
        self._target.sync()

    def replace(self) -> None:
        if self.count:
            self._target.replace()
        else:
            self._target.discard()
            self.path.unlink(missing_ok=True)

    def abort(self) -> None:
        with suppress(OSError):  # on a full disk, closing fails again because of the buffered data
            self._file.close()
        self._target.discard()
