"""One class per `--dataload`: where in the token stream the tokens of a row lie.

T = ctx_len. A row is T + 1 tokens: T inputs and, one to the right, T targets.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.order import Shuffle, philox
from rwkv_peft.data.rows.packing import pack_rows
from rwkv_peft.data.rows.primes import walk_prime
from rwkv_peft.errors import ConfigError

Span = tuple[int, int]
"""First and one past the last token, in the stream."""


class RowPicker(Protocol):
    """One `--dataload`."""

    samples_per_pass: int
    """Rows that make one pass over the data."""
    targets: int
    """Tokens that a pass predicts, before any --loss_mask."""
    truncated: int
    """Documents longer than a row, whose end is never seen."""
    padding: float
    """Share of the places of a pass that are padding."""

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        """What the row holds, one after another: at most T + 1 tokens; several spans are documents side by side."""


def make_picker(reader: BinidxReader, config: DataConfig, source: int = 0) -> RowPicker:
    """The picker of `config.dataload`; `source` is the number of the --data_file, whose order is its own.

    Raises:
        ConfigError: --magic_prime or --my_exit_tokens do not fit the data.
    """
    tokens = len(reader.tokens)
    if config.my_exit_tokens and config.dataload in ("get", "walk") and config.my_exit_tokens != tokens:
        expected = f"{tokens}, the tokens of {reader.prefix}"
        raise ConfigError("my_exit_tokens", found=config.my_exit_tokens, expected=expected)
    if config.walks:
        _check_prime(reader, config)
        return PrimeWalk(tokens, config.ctx_len)
    if config.dataload == "get":
        return RandomWindows(tokens, config.ctx_len, source)
    pieces = Pieces(reader.bounds, config.ctx_len, split=config.long == "split")
    if config.dataload == "pack":
        return PackedDocuments(pieces, config.ctx_len, source)
    return Documents(pieces, config.ctx_len, source, padded=config.dataload == "pad")


def _check_prime(reader: BinidxReader, config: DataConfig) -> None:
    prime = walk_prime(len(reader.tokens), config.ctx_len)
    if config.magic_prime in (0, prime):
        return
    expected = f"{prime or 0}, for {len(reader.tokens)} tokens of {reader.prefix} and ctx_len {config.ctx_len}"
    raise ConfigError("magic_prime", found=config.magic_prime, expected=expected, hint="Or leave it away.")


class RandomWindows:
    """`--dataload get`: windows at uniformly random places of the whole stream, across document ends.

    A stream of at most T tokens has one window: all of it, padded.
    """

    truncated = 0

    def __init__(self, tokens: int, ctx_len: int, source: int) -> None:
        self._tokens, self._ctx_len, self._source = tokens, ctx_len, source
        self._starts = max(tokens - ctx_len, 1)
        self.targets = max(tokens - 1, 0)
        self.samples_per_pass = max(-(-self.targets // ctx_len), 1)
        self.padding = max(0.0, 1 - self.targets / ctx_len)

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        draw = int(philox(seed, epoch, index, self._source).random_raw())
        start = draw * self._starts >> 64  # uniform in [0, starts), with a bias below starts / 2**64
        return [(start, min(start + self._ctx_len + 1, self._tokens))]


class PrimeWalk:
    """`--dataload walk`: RWKV-LM's order over windows side by side, each exactly once in a pass.

    Window number ii of the run, from 1, is (factor * ii**3) mod p, in steps of T tokens; p is `walk_prime`. As p is
    3n + 2, cubing permutes the residues. Neither seed nor epoch matter: passes go on alike, as in RWKV-LM. What lies
    behind window p - 1 (up to two windows and the gap between primes) is never seen. Data of about three windows
    or fewer have no such prime; their windows come in their order.
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
        place = self._factor * (index + 1) ** 3 if self._factor else index
        start = place % self.samples_per_pass * self._ctx_len
        return [(start, min(start + self._ctx_len + 1, self._tokens))]


class Windows:
    """Windows side by side in their order, the last one padded: every token but the first is a target once."""

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
    """Documents as they fit rows: cut at T + 1 tokens (`--long truncate`), or in as many pieces as it takes (`split`).

    Pieces of a document share a token, the last target of one and the first input of the next: every token of the
    document but its first is a target once.

    Args:
        bounds: (documents + 1,) int64, as in BinidxReader.
    """

    def __init__(self, bounds: np.ndarray, ctx_len: int, *, split: bool) -> None:
        self._bounds, self._ctx_len = bounds, ctx_len
        sizes = np.diff(bounds)  # (documents,)
        self.truncated = 0 if split else int((sizes > ctx_len + 1).sum())
        self._first: np.ndarray | None = None  # (documents + 1,): number of each document's first piece
        if split:
            counts = np.maximum(-(-(sizes - 1) // ctx_len), 1)
            self._first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self._bounds) - 1 if self._first is None else int(self._first[-1])

    def span(self, piece: int) -> Span:
        document, offset = piece, 0
        if self._first is not None:
            document = int(np.searchsorted(self._first, piece, side="right")) - 1
            offset = (piece - int(self._first[document])) * self._ctx_len
        start, stop = int(self._bounds[document]) + offset, int(self._bounds[document + 1])
        return start, min(stop, start + self._ctx_len + 1)

    def sizes(self) -> np.ndarray:
        """Tokens of each piece, (pieces,) int64."""
        sizes = np.diff(self._bounds)
        if self._first is None:
            return np.minimum(sizes, self._ctx_len + 1)
        counts = np.diff(self._first)
        number = np.arange(len(self)) - np.repeat(self._first[:-1], counts)  # of the piece in its document
        return np.minimum(np.repeat(sizes, counts) - number * self._ctx_len, self._ctx_len + 1)


class Documents:
    """`--dataload pad` and `only`: one document, or piece of one, a row, in a new order each epoch.

    An epoch of more rows than there are goes on with another order, so that each is seen once before any is seen twice.
    """

    def __init__(self, pieces: Pieces, ctx_len: int, source: int, *, padded: bool) -> None:
        self._pieces = pieces
        self._shuffle = Shuffle(len(pieces), source)
        self.samples_per_pass = len(pieces)
        self.truncated = pieces.truncated
        self.targets = int(np.maximum(pieces.sizes() - 1, 0).sum())
        self.padding = 1 - self.targets / (len(pieces) * ctx_len) if padded else 0.0

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        return [self._pieces.span(self._shuffle(seed, epoch, index))]


class PackedDocuments:
    """`--dataload pack`: whole documents side by side, best-fit; the rows come in a new order each epoch.

    A document of n tokens takes n inputs, its end-of-document token included. A row has room for T + 1 tokens, of which
    the last is a target only. Which documents share a row is the same in every epoch. Empty documents are left out.
    """

    def __init__(self, pieces: Pieces, ctx_len: int, source: int) -> None:
        self._pieces = pieces
        self.truncated = pieces.truncated
        sizes = pieces.sizes()
        self._items, self._bounds = pack_rows(sizes, ctx_len + 1)
        self.samples_per_pass = max(len(self._bounds) - 1, 1)
        self._shuffle = Shuffle(self.samples_per_pass, source)
        self.targets = int(np.maximum(sizes - 1, 0).sum())
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self._items])])[self._bounds]
        inputs = np.minimum(np.diff(sums), ctx_len)  # (rows,)
        self.padding = 1 - int(inputs.sum()) / (self.samples_per_pass * ctx_len)

    def spans(self, seed: int, epoch: int, index: int) -> list[Span]:
        row = self._shuffle(seed, epoch, index)
        return [self._pieces.span(int(item)) for item in self._items[self._bounds[row] : self._bounds[row + 1]]]
