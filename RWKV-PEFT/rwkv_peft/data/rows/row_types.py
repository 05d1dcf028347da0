"""The kinds of rows, one class for each `--dataload`: a class decides which tokens a row consists of.

T = ctx_len. A row has T + 1 tokens: T inputs and T targets, which are the inputs shifted by one.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.bin_packing import pack_rows
from rwkv_peft.data.rows.order import Shuffle, philox
from rwkv_peft.data.rows.primes import walk_prime
from rwkv_peft.errors import ConfigError

Span = tuple[int, int]
"""First token and end (exclusive) in the tokens of a pair."""


class RowPicker(Protocol):
    """Picks the tokens of rows, as one `--dataload` defines it."""

    samples_per_pass: int
    """Rows of one pass over the data."""
    targets: int
    """Targets of one pass, before any --loss_mask."""
    truncated: int
    """Documents longer than a row, whose end is never used."""
    padding: float
    """Fraction of a pass that is padding, from 0 to 1."""

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        """Return the tokens of a row, at most T + 1. Several spans are separate documents."""


def make_picker(reader: BinidxReader, config: DataConfig, stream: int = 0) -> RowPicker:
    """Return the picker for `config.dataload`.

    Args:
        reader: the pair.
        config: the data flags.
        stream: number of the pair in the run, so that each pair has its own random order.
    Raises:
        ConfigError: --magic_prime or --my_exit_tokens do not fit the data.
    """
    tokens = len(reader.tokens)
    if config.my_exit_tokens and config.dataload in ("get", "walk") and config.my_exit_tokens != tokens:
        expected = f"{tokens}, the number of tokens in {reader.prefix}"
        raise ConfigError("my_exit_tokens", found=config.my_exit_tokens, expected=expected)
    if config.walks:
        _check_prime(reader, config)
        return PrimeWalk(tokens, config.ctx_len)
    if config.dataload == "get":
        return RandomWindows(tokens, config.ctx_len, stream)
    pieces = Pieces(reader.bounds, config.ctx_len, split=config.long == "split")
    if config.dataload == "pack":
        return PackedDocuments(pieces, config.ctx_len, stream)
    return Documents(pieces, config.ctx_len, stream, padded=config.dataload == "pad")


def _check_prime(reader: BinidxReader, config: DataConfig) -> None:
    prime = walk_prime(len(reader.tokens), config.ctx_len)
    if config.magic_prime in (0, prime):
        return
    expected = f"{prime or 0}, for the {len(reader.tokens)} tokens of {reader.prefix} and ctx_len {config.ctx_len}"
    raise ConfigError(
        "magic_prime",
        found=config.magic_prime,
        expected=expected,
        hint=f"Use {prime}, or omit the flag." if prime else "Omit the flag.",
    )


class RandomWindows:
    """`--dataload get`: windows at uniformly random positions, regardless of document ends.

    Data of at most T tokens has one window, which is padded.
    """

    truncated = 0

    def __init__(self, tokens: int, ctx_len: int, stream: int) -> None:
        self._tokens, self._ctx_len, self._stream = tokens, ctx_len, stream
        self._starts = max(tokens - ctx_len, 1)
        self.targets = max(tokens - 1, 0)
        self.samples_per_pass = max(-(-self.targets // ctx_len), 1)
        self.padding = max(0.0, 1 - self.targets / ctx_len)

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        draw = int(philox(seed, epoch, index, self._stream).random_raw())
        start = draw * self._starts >> 64  # uniform in [0, starts), with a bias below starts / 2**64
        return [(start, min(start + self._ctx_len + 1, self._tokens))]


class PrimeWalk:
    """`--dataload walk`: RWKV-LM's order of consecutive windows, each exactly once per pass.

    The run's row number ii, from 1, is window (factor * ii**3) mod p, where windows are T tokens apart and p is
    `walk_prime`. Because p is 3n + 2, cubing permutes the residues. Seed and epoch do not matter: all passes have the
    same order, as in RWKV-LM. Tokens after window p - 1 (up to two windows and the gap between primes) are never used.
    Data of about three windows or fewer has no such prime; its windows then come in file order.
    """

    truncated = 0

    def __init__(self, tokens: int, ctx_len: int) -> None:
        self._tokens, self._ctx_len = tokens, ctx_len
        prime = walk_prime(tokens, ctx_len)
        self._factor = int(prime * (5**0.5 - 1) / 2) if prime else 0
        self.samples_per_pass = prime or max((tokens - 1) // ctx_len, 1)
        self.targets = min(self.samples_per_pass * ctx_len, max(tokens - 1, 0))
        self.padding = 1 - self.targets / (self.samples_per_pass * ctx_len)

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        window = self._factor * (index + 1) ** 3 if self._factor else index
        start = window % self.samples_per_pass * self._ctx_len
        return [(start, min(start + self._ctx_len + 1, self._tokens))]


class ConsecutiveWindows:
    """Consecutive windows in file order, the last one padded. Every token except the first is a target once."""

    truncated = 0

    def __init__(self, tokens: int, ctx_len: int) -> None:
        self._tokens, self._ctx_len = tokens, ctx_len
        self.targets = max(tokens - 1, 0)
        self.samples_per_pass = max(-(-self.targets // ctx_len), 1)
        self.padding = 1 - self.targets / (self.samples_per_pass * ctx_len)

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        start = index % self.samples_per_pass * self._ctx_len
        return [(start, min(start + self._ctx_len + 1, self._tokens))]


class Pieces:
    """Pieces of documents that fit a row: `--long truncate` cuts documents at T + 1 tokens, `split` makes more pieces.

    Consecutive pieces of a document share a token: the last target of one is the first input of the next. So every
    token of the document except the first is a target once.

    Args:
        bounds: (documents + 1,) int64, as in BinidxReader.
        ctx_len: T.
        split: split long documents instead of truncating them.
    """

    def __init__(self, bounds: np.ndarray, ctx_len: int, *, split: bool) -> None:
        self._bounds, self._ctx_len = bounds, ctx_len
        sizes = np.diff(bounds)  # (documents,)
        self.truncated = 0 if split else int((sizes > ctx_len + 1).sum())
        self._first: np.ndarray | None = None  # (documents + 1,), each document's first piece
        if split:
            counts = np.maximum(-(-(sizes - 1) // ctx_len), 1)
            self._first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self._bounds) - 1 if self._first is None else int(self._first[-1])

    def span(self, piece: int) -> Span:
        """Return the tokens of a piece."""
        document, offset = piece, 0
        if self._first is not None:
            document = int(np.searchsorted(self._first, piece, side="right")) - 1
            offset = (piece - int(self._first[document])) * self._ctx_len
        start, stop = int(self._bounds[document]) + offset, int(self._bounds[document + 1])
        return start, min(stop, start + self._ctx_len + 1)

    def sizes(self) -> np.ndarray:
        """Return the number of tokens of each piece, (pieces,) int64."""
        sizes = np.diff(self._bounds)
        if self._first is None:
            return np.minimum(sizes, self._ctx_len + 1)
        counts = np.diff(self._first)
        number = np.arange(len(self)) - np.repeat(self._first[:-1], counts)  # of each piece in its document
        return np.minimum(np.repeat(sizes, counts) - number * self._ctx_len, self._ctx_len + 1)


class Documents:
    """`--dataload pad` and `only`: one document, or piece of one, per row, in a new order in each epoch.

    An epoch with more rows than pieces continues in another order, so no piece is used twice before all are used once.
    """

    def __init__(self, pieces: Pieces, ctx_len: int, stream: int, *, padded: bool) -> None:
        self._pieces = pieces
        self._shuffle = Shuffle(len(pieces), stream)
        self.samples_per_pass = len(pieces)
        self.truncated = pieces.truncated
        self.targets = int(np.maximum(pieces.sizes() - 1, 0).sum())
        self.padding = 1 - self.targets / (len(pieces) * ctx_len) if padded else 0.0

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        return [self._pieces.span(self._shuffle(seed, epoch, index))]


class PackedDocuments:
    """`--dataload pack`: several whole documents per row (best-fit packing), the rows in a new order in each epoch.

    A row has space for T + 1 tokens; the last one is only a target. A document of n tokens, its end-of-document token
    included, takes n inputs. The same documents share a row in every epoch. Empty documents are left out.
    """

    def __init__(self, pieces: Pieces, ctx_len: int, stream: int) -> None:
        self._pieces = pieces
        self.truncated = pieces.truncated
        sizes = pieces.sizes()
        self._pieces_by_row, self._bounds = pack_rows(sizes, ctx_len + 1)
        self.samples_per_pass = max(len(self._bounds) - 1, 1)
        self._shuffle = Shuffle(self.samples_per_pass, stream)
        self.targets = int(np.maximum(sizes - 1, 0).sum())
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self._pieces_by_row])])[self._bounds]
        inputs = np.minimum(np.diff(sums), ctx_len)  # (rows,)
        self.padding = 1 - int(inputs.sum()) / (self.samples_per_pass * ctx_len)

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        row = self._shuffle(seed, epoch, index)
        return [
            self._pieces.span(int(piece)) for piece in self._pieces_by_row[self._bounds[row] : self._bounds[row + 1]]
        ]
