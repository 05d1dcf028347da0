"""Decides which tokens are in the loss: one class for each kind of `--loss_mask`. Padding is never in the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.markers import Sequences, find_sequences, ranges_between, spellings
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer, same_tokenizer
from rwkv_peft.errors import ConfigError, DataError

QA_OPENING, QA_CLOSING = "Assistant:", "User:"
"""`--loss_mask qa` trains the text from the first to the second."""

_CHUNK = 2**22


class TokenMask(Protocol):
    """Decides which tokens of a pair are trained."""

    name: str
    """The value of --loss_mask; never "auto"."""
    untrained_documents: int
    """Documents without a token in the loss: they have no markers, or their mask is all zero."""

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Return whether predicting each of the tokens start..stop is trained, (stop - start,) bool."""


def make_mask(reader: BinidxReader, config: DataConfig) -> TokenMask:
    """Return the mask of `config.loss_mask`. `auto` is `file` if the pair has a mask file, else `pad`.

    Raises:
        DataError: there is no mask file (`file`), the tokenizer is unknown (`qa`, and `se` with text), or no document
            has a token in the loss.
        ConfigError: a marker of --mask_id is neither text nor token ids.
    """
    name = config.loss_mask
    if name == "auto":
        name = "pad" if reader.mask is None else "file"
    if name in ("none", "pad"):
        return AllTokens(name)
    if name == "file":
        if reader.mask is None:
            hint = "rwkv-peft convert writes it for records with answers. Or choose a different --loss_mask."
            raise DataError(f"{reader.prefix}.mask.bin", "no such file, but --loss_mask file needs it", hint=hint)
        mask: TokenMask = MaskFromFile(reader)
    else:
        mask = MaskFromMarkers(name, reader, *_markers(reader, name, config.mask_id))
    if mask.untrained_documents == len(reader):
        hint = "Choose a different --loss_mask, or look at the data with rwkv-peft inspect."
        raise DataError(reader.prefix, f"no document has a token in the loss with --loss_mask {name}", hint=hint)
    return mask


class AllTokens:
    """`none` and `pad`: all tokens are in the loss."""

    untrained_documents = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def trained(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, dtype=bool)


class MaskFromFile:
    """`file`: the tokens that PREFIX.mask.bin marks."""

    name = "file"

    def __init__(self, reader: BinidxReader) -> None:
        self.trained = reader.trained
        tokens = len(reader.tokens)
        parts = ((i, reader.trained(i, min(i + _CHUNK, tokens))) for i in range(0, tokens, _CHUNK))
        self.untrained_documents = _documents_without(reader.bounds, (np.flatnonzero(part) + i for i, part in parts))


class MaskFromMarkers:
    """`qa` and `se`: the tokens from an opening marker to the next closing marker, or to the document's eod.

    The tokens are searched once, on opening (0.7 s for 100 M tokens); a row then only looks up the ranges.
    """

    def __init__(self, name: str, reader: BinidxReader, opening: Sequences, closing: Sequences) -> None:
        self.name = name
        openings, closings = (find_sequences(reader.tokens, sequences) for sequences in (opening, closing))
        ranges = ranges_between(openings, closings, reader.bounds)
        self._starts, self._stops = ranges[:, 0].copy(), ranges[:, 1].copy()
        self.untrained_documents = _documents_without(reader.bounds, [self._starts])

    def trained(self, start: int, stop: int) -> np.ndarray:
        mask = np.zeros(stop - start, dtype=bool)
        first = int(np.searchsorted(self._stops, start, side="right"))
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for i in range(first, last):
            mask[max(int(self._starts[i]) - start, 0) : int(self._stops[i]) - start] = True
        return mask


def _documents_without(bounds: np.ndarray, positions: Iterable[np.ndarray]) -> int:
    """Return the number of documents that contain none of the positions."""
    seen = np.zeros(len(bounds) - 1, dtype=bool)
    for part in positions:
        seen[np.searchsorted(bounds, part, side="right") - 1] = True
    return int(len(seen) - seen.sum())


def _markers(reader: BinidxReader, name: str, mask_id: Mapping[str, Any]) -> tuple[Sequences, Sequences]:
    """Return the token sequences of the opening and of the closing marker."""
    if name == "qa":
        tokenizer = _tokenizer(reader, name)
        return spellings(tokenizer, QA_OPENING), spellings(tokenizer, QA_CLOSING)
    opening, closing = (_marker(reader, key, mask_id[key]) for key in ("mask1", "mask0"))
    return opening, closing


def _marker(reader: BinidxReader, key: str, value: Any) -> Sequences:
    """Return the token sequences of a marker: all spellings of a text, or the token ids as given."""
    ids = value if isinstance(value, list) else [value]
    if ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        return [tuple(ids)]
    if not isinstance(value, str) or not value:
        raise ConfigError("mask_id", key, found=repr(value), expected="a text, a token id or a list of token ids")
    return spellings(_tokenizer(reader, "se"), value)


def _tokenizer(reader: BinidxReader, name: str) -> Tokenizer:
    """Return the tokenizer that made the pair.

    Raises:
        DataError: the pair does not name it, or it cannot be found, or it has changed.
    """
    where, meta = f"{reader.prefix}.meta.json", reader.meta
    hint = "Convert again with rwkv-peft convert, or use --loss_mask se with token ids in --mask_id."
    if meta is None:
        what = f"no such file, but --loss_mask {name} needs the tokenizer to find the markers"
        raise DataError(where, what, hint=hint)
    if meta.tokenizer_spec not in ("world", "bytes") and not Path(meta.tokenizer_spec).is_file():
        what = f"--loss_mask {name} needs the tokenizer, but there is no file {meta.tokenizer_spec}"
        raise DataError(where, what, hint=hint)
    tokenizer = load_tokenizer(meta.tokenizer_spec)
    if not same_tokenizer(tokenizer.identity, meta.tokenizer):
        what = f"--loss_mask {name} needs the tokenizer, but {meta.tokenizer_spec} has changed since the conversion"
        raise DataError(where, what, hint=hint)
    return tokenizer
