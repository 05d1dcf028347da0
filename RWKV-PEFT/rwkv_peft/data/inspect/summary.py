"""Describes a binidx pair in text. tools/inspect_data.py is its command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.inspect.token_view import TokenView
from rwkv_peft.data.rows.sampling import Samples, check_ids
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer, same_tokenizer
from rwkv_peft.errors import ConfigError, UserError

ANY_ID = 2**63 - 1
"""Vocabulary size to use if it is unknown: it allows every id that is not negative."""

_SUFFIXES = (".bin", ".idx", ".meta.json", ".mask.bin")
_BINS = 16
_BAR = 50
_CHUNK = 2**24


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a pair, as far as it is known."""

    tokenizer: Tokenizer | None
    size: int | None
    eod: int | None
    note: str | None
    """Why text cannot be shown, or may be wrong."""


def find_vocabulary(reader: BinidxReader, spec: str | None) -> Vocabulary:
    """Return the vocabulary of the tokenizer `spec`, or of the tokenizer that the sidecar names.

    Raises:
        UserError: there is no tokenizer `spec`.
    """
    meta = reader.meta
    if spec is None and meta is None:
        return Vocabulary(
            None, None, None, "the tokenizer is unknown because there is no .meta.json; give it with --tokenizer"
        )
    if spec is not None:
        tokenizer = load_tokenizer(spec)
    else:
        try:
            tokenizer = load_tokenizer(meta.tokenizer_spec)
        except UserError:
            note = f"tokenizer {meta.tokenizer_spec} cannot be read, so ids are shown; give it with --tokenizer"
            return Vocabulary(None, meta.vocab_size, meta.eod, note)
    note = None
    if meta is not None and not same_tokenizer(meta.tokenizer, tokenizer.identity):
        note = f"{tokenizer.spec} is not the tokenizer of this pair ({meta.tokenizer['name']}): text may be wrong"
    return Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eod, note)


def summary(reader: BinidxReader, vocabulary: Vocabulary) -> str:
    """Return lines with files, counts and lengths. Reads the index and the mask, but no token."""
    sizes, meta = reader.sizes, reader.meta
    paths = {suffix: Path(reader.prefix + suffix) for suffix in _SUFFIXES}
    files = "  ".join(f"{suffix} {path.stat().st_size:,}" for suffix, path in paths.items() if path.exists())
    lines = [
        f"pair       {reader.prefix}",
        f"bytes      {files}",
        f"documents  {len(reader):,}",
        f"tokens     {len(reader.tokens):,} of {reader.dtype.name}",
    ]
    if meta is not None:
        name = f"{meta.tokenizer_spec} ({meta.tokenizer['name']}, sha256 {meta.tokenizer['sha256'][:12]})"
        lines.append(f"tokenizer  {name}, {meta.vocab_size} ids, end-of-document id {meta.eod}")
    if vocabulary.note:
        lines.append(f"note: {vocabulary.note}")
    lines.append(f"loss mask  {_mask_line(reader)}")
    marks = np.percentile(sizes, (0, 10, 50, 90, 99, 100), method="inverted_cdf")
    names = ("shortest", "10th percentile", "median", "90th percentile", "99th percentile", "longest")
    lines.append("lengths    " + ", ".join(f"{name} {mark:,}" for name, mark in zip(names, marks, strict=True)))
    lines.append(f"           mean {sizes.mean():,.1f} tokens; number of documents by length:")
    return "\n".join([*lines, histogram(sizes)])


def _mask_line(reader: BinidxReader) -> str:
    if reader.mask is None:
        return "none: all tokens are in the loss"
    trained = sum(int(reader.trained(*span).sum()) for span in _chunks(len(reader.tokens)))
    line = f"{trained:,} of {len(reader.tokens):,} tokens are in the loss ({trained / len(reader.tokens):.1%})"
    not_empty = reader.sizes > 0
    untrained = int((np.add.reduceat(reader.mask, reader.bounds[:-1][not_empty], dtype=np.int64) == 0).sum())
    return line + (f"; {_count(untrained, 'document')} without a token in the loss" if untrained else "")


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, _CHUNK):
        yield start, min(start + _CHUNK, total)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def histogram(sizes: np.ndarray) -> str:
    """Return a bar for each range of lengths. The ranges have equal width; the longest 1 % share the last one."""
    first, last = (int(mark) for mark in np.percentile(sizes, (0, 99), method="inverted_cdf"))
    width = _round_up((last - first + 1) / _BINS)
    low = first // width * width
    counts = np.bincount(np.minimum((sizes - low) // width, (last - low) // width))
    rows = []
    for number, count in enumerate(counts):
        start = low + number * width
        stop = start + width - 1 if number < len(counts) - 1 else max(int(sizes.max()), start + width - 1)
        label = f"{start:,}" if start == stop else f"{start:,} to {stop:,}"
        rows.append((label, f"{count:,}", "#" * -(-int(count) * _BAR // int(counts.max()))))
    wide, narrow = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {label:>{wide}}  {count:>{narrow}}  {bar}".rstrip() for label, count, bar in rows)


def _round_up(width: float) -> int:
    """Round up to one of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= width:
                return step * power
        power *= 10


def check(reader: BinidxReader, vocab_size: int | None, eod: int | None) -> str:
    """Check the whole pair, including all tokens and the mask, and return the lines to print.

    Args:
        reader: the pair.
        vocab_size: all token ids must be smaller; None if it is unknown.
        eod: the end-of-document id; None if it is unknown.
    Raises:
        DataError: a token id is outside the vocabulary, or the mask has an invalid value.
    """
    total, sizes = len(reader.tokens), reader.sizes
    check_ids(reader, 0, total, ANY_ID if vocab_size is None else vocab_size)
    spans = list(_chunks(total))
    lowest = min(int(reader.tokens[slice(*span)].min()) for span in spans)
    highest = max(int(reader.tokens[slice(*span)].max()) for span in spans)
    known = "vocabulary size unknown, see --vocab_size" if vocab_size is None else f"vocabulary of {vocab_size:,}"
    agree = "index and sizes agree" if reader.meta is None else "index, sizes and .meta.json agree"
    lines = [f"check      {agree}", f"           ids from {lowest} to {highest}: {known}"]
    if reader.mask is not None:
        for span in spans:
            reader.trained(*span)
        lines.append("           mask is valid: one 0 or 1 for each token")
    if not sizes.all():
        lines.append(f"           {_count(int((sizes == 0).sum()), 'empty document')}")
    if eod is not None:
        ends = int((reader.tokens[reader.bounds[1:][sizes > 0] - 1] == eod).sum())
        inside = sum(int((reader.tokens[slice(*span)] == eod).sum()) for span in spans) - ends
        end = f"{ends:,} of {_count(len(sizes), 'document')} end with {eod}"
        lines.append(f"           {end}, which occurs {inside:,} times elsewhere")
    return "\n".join(lines)


def parse_documents(words: Sequence[str], count: int) -> Iterator[int]:
    """Return document numbers for words such as `0` and `5-7`, for a pair of `count` documents.

    Raises:
        ConfigError: a word is neither a number nor a range, or is out of range.
    """
    ranges = []
    for word in words:
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", word)
        if not match:
            raise ConfigError("documents", found=repr(word), expected="numbers and ranges such as: 0 5-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise _wrong_range(word, first, last, count)
        ranges.append(range(first, last + 1))
    return (number for numbers in ranges for number in numbers)


def _wrong_range(word: str, first: int, last: int, count: int) -> ConfigError:
    if last < first:
        return ConfigError("documents", found=word, expected="a first number that is not above the last")
    number = first if first >= count else last
    return ConfigError("documents", what=f"there is no document {number}; the last is {count - 1}")


def show_document(reader: BinidxReader, number: int, view: TokenView) -> str:
    """Return a heading and the text of a document, with the tokens highlighted that the pair's mask trains."""
    start, stop = (int(bound) for bound in reader.bounds[number : number + 2])
    trained = None if reader.mask is None else reader.trained(start, stop)
    suffix = "" if trained is None else f", {int(trained.sum()):,} in the loss"
    if start == stop:
        return f"document {number}: empty"
    heading = f"document {number}: {_count(stop - start, 'token')} ({start:,} to {stop - 1:,}){suffix}"
    return f"{heading}\n{view.show(reader.document(number), trained)}"


def batches(samples: Samples, config: DataConfig, count: int) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Yield (batch, row, sample) for the first `count` micro-batches of the run's first epoch on one device.

    On w devices, device q gets micro-batch s * w + q as its micro-batch s.
    """
    for index in range(min(count, config.epoch_steps or count) * config.micro_bsz):
        batch, row = divmod(index, config.micro_bsz)
        yield batch, row, samples.sample(config.random_seed, config.epoch_begin, index)


def show_row(batch: int, row: int, sample: dict[str, np.ndarray], view: TokenView) -> str:
    """Return a heading and the row's T + 1 tokens, the trained ones highlighted. Padding is only counted."""
    mask = np.asarray(sample["loss_mask"]).astype(bool)  # (T,)
    ids = np.append(sample["input_ids"][:1], sample["targets"])  # (T + 1,)
    trained = np.append(False, mask)  # the first token is never predicted
    used = np.flatnonzero((ids != 0) | trained)
    end = int(used[-1]) + 1 if len(used) else 0
    heading = f"batch {batch}, row {row}: {int(mask.sum()):,} of {len(mask):,} targets are in the loss"
    starts = np.asarray(sample.get("starts", ()))
    positions = np.flatnonzero(starts) if starts.dtype == bool else starts
    lines = [heading, view.show(ids[:end], trained[:end], positions)] if end else [heading]
    if end < len(ids):
        lines.append(f"  ... and {_count(len(ids) - end, 'zero')}, not in the loss")
    return "\n".join(lines)
