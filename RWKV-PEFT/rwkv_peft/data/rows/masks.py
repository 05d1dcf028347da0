"""Which tokens of the stream train. One class per kind of `--loss_mask`; padding is no token and never trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.markers import Sequences, between, find, spellings
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer, same_tokenizer
from rwkv_peft.errors import ConfigError, DataError

QA_OPENING, QA_CLOSING = "Assistant:", "User:"
"""`--loss_mask qa` trains what lies between."""

_CHUNK = 2**22


class TokenMask(Protocol):
    """Which tokens train, as targets."""

    name: str
    """The --loss_mask it is."""
    silent: int
    """Documents that train nothing: their markers are missing, or their mask is all zero."""

    def trains(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool: True where predicting that token of the stream trains."""


def make_mask(reader: BinidxReader, config: DataConfig) -> TokenMask:
    """The mask of `config.loss_mask`; auto takes the companion where the pair has one.

    Raises:
        DataError: no companion (`file`), no known tokenizer (`qa`, and `se` with text), or nothing that trains.
        ConfigError: a marker of --mask_id is no text and no ids.
    """
    name = config.loss_mask
    if name == "auto":
        name = "pad" if reader.mask is None else "file"
    if name in ("none", "pad"):
        return EveryToken(name)
    if name == "file":
        if reader.mask is None:
            hint = "tools/json2binidx.py writes it for chat records; or choose another --loss_mask."
            raise DataError(f"{reader.prefix}.mask.bin", "no such file, which --loss_mask file needs", hint=hint)
        mask: TokenMask = Companion(reader)
    else:
        mask = Answers(name, reader, *_markers(reader, name, config.mask_id))
    if mask.silent == len(reader):
        hint = "Choose another --loss_mask, or look at the data with tools/inspect.py."
        raise DataError(reader.prefix, f"--loss_mask {name} leaves nothing to train in any document", hint=hint)
    return mask


class EveryToken:
    """`none` and `pad`: nothing but padding is kept out."""

    silent = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def trains(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, dtype=bool)


class Companion:
    """`file`: what PREFIX.mask.bin says."""

    name = "file"

    def __init__(self, reader: BinidxReader) -> None:
        self.trains = reader.trained
        tokens = len(reader.tokens)
        parts = ((i, reader.trained(i, min(i + _CHUNK, tokens))) for i in range(0, tokens, _CHUNK))
        self.silent = _without_any(reader.bounds, (np.flatnonzero(part) + i for i, part in parts))


class Answers:
    """`qa` and `se`: from after an opening marker to before the next closing one, or the document's end with its eod.

    The stream is searched once, on opening (0.7 s for 100 M tokens); a sample then only looks ranges up.
    """

    def __init__(self, name: str, reader: BinidxReader, opening: Sequences, closing: Sequences) -> None:
        self.name = name
        ranges = between(find(reader.tokens, opening), find(reader.tokens, closing), reader.bounds)
        self._starts, self._stops = ranges[:, 0].copy(), ranges[:, 1].copy()
        self.silent = _without_any(reader.bounds, [self._starts])

    def trains(self, start: int, stop: int) -> np.ndarray:
        mask = np.zeros(stop - start, dtype=bool)
        first = int(np.searchsorted(self._stops, start, side="right"))
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for i in range(first, last):
            mask[max(int(self._starts[i]) - start, 0) : int(self._stops[i]) - start] = True
        return mask


def _without_any(bounds: np.ndarray, places: Iterable[np.ndarray]) -> int:
    """Documents that hold none of the places; each array ascending."""
    seen = np.zeros(len(bounds) - 1, dtype=bool)
    for part in places:
        seen[np.searchsorted(bounds, part, side="right") - 1] = True
    return int(len(seen) - seen.sum())


def _markers(reader: BinidxReader, name: str, mask_id: Mapping[str, Any]) -> tuple[Sequences, Sequences]:
    """Token sequences of the markers that open and close what trains."""
    if name == "qa":
        tokenizer = _tokenizer(reader, name)
        return spellings(tokenizer, QA_OPENING), spellings(tokenizer, QA_CLOSING)
    opening, closing = (_marker(reader, key, mask_id[key]) for key in ("mask1", "mask0"))
    return opening, closing


def _marker(reader: BinidxReader, key: str, value: Any) -> Sequences:
    """A text is looked for in all its spellings; a token id, or a list of them, as it is."""
    ids = value if isinstance(value, list) else [value]
    if ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        return [tuple(ids)]
    if not isinstance(value, str) or not value:
        raise ConfigError("mask_id", key, found=repr(value), expected="a text, a token id or a list of token ids")
    return spellings(_tokenizer(reader, "se"), value)


def _tokenizer(reader: BinidxReader, name: str) -> Tokenizer:
    """The tokenizer that made the pair."""
    where, meta = f"{reader.prefix}.meta.json", reader.meta
    hint = "Make the pair with tools/json2binidx.py, or use --loss_mask se with token ids in --mask_id."
    if meta is None:
        what = f"no such file: --loss_mask {name} must know the tokenizer to find its markers"
        raise DataError(where, what, hint=hint)
    if meta.tokenizer_spec not in ("world", "bytes") and not Path(meta.tokenizer_spec).is_file():
        what = f"--loss_mask {name} needs its tokenizer, and {meta.tokenizer_spec} is not there"
        raise DataError(where, what, hint=hint)
    tokenizer = load_tokenizer(meta.tokenizer_spec)
    if not same_tokenizer(tokenizer.identity, meta.tokenizer):
        what = f"--loss_mask {name} needs its tokenizer, and {meta.tokenizer_spec} is another now"
        raise DataError(where, what, hint=hint)
    return tokenizer
