"""Finds markers such as `Assistant:` in a stream of tokens, and the ranges between two kinds of markers."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import numpy as np

from rwkv_peft.data.tokenizer import Tokenizer

_NEIGHBORS = ("", " ", "\n", "\n\n", *string.punctuation, "**", "--", "://", "</", "..", "!!", "??", "```")
"""Text next to a marker that may share a token with it: `:` and `\"` are one token in `Assistant:"`."""

_CHUNK = 2**24

Sequences = list[tuple[int, ...]]


def spellings(tokenizer: Tokenizer, marker: str) -> Sequences:
    """Return the token sequences that `marker` may become, depending on the text next to it.

    They include tokens that the marker shares with its neighbors. Letters and digits are not considered as neighbors,
    because the marker would then be a part of another word.
    """
    found = {tuple(tokenizer.encode(marker))}
    for before in _NEIGHBORS:
        for after in ("x", *_NEIGHBORS):
            found |= _covering(tokenizer, before, marker, after)
    return sorted(found)


def _covering(tokenizer: Tokenizer, before: str, marker: str, after: str) -> set[tuple[int, ...]]:
    """Return the tokens of before + marker + after that contain a part of the marker.

    Empty if the tokens do not decode to the text.
    """
    ids = tokenizer.encode(before + marker + after)
    if tokenizer.decode(ids) != before + marker + after:
        return set()
    ends = np.array([len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))])
    first = int(np.searchsorted(ends, len(before), side="right"))
    last = int(np.searchsorted(ends, len(before) + len(marker), side="left"))
    return {tuple(ids[first : last + 1])}


def find_sequences(tokens: np.ndarray, sequences: Iterable[Sequence[int]]) -> np.ndarray:
    """Return (matches, 2) int64: first token and end of every occurrence, sorted by first token."""
    by_first: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        by_first.setdefault(sequence[0], []).append(np.asarray(sequence))
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(tokens), _CHUNK):
        for first, group in by_first.items():
            positions = start + np.flatnonzero(tokens[start : start + _CHUNK] == first)
            found += [_verified(tokens, positions, sequence) for sequence in group]
    matches = np.concatenate(found)
    return matches[np.lexsort((matches[:, 1], matches[:, 0]))]


def _verified(tokens: np.ndarray, positions: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """Return (matches, 2): the positions at which all of the sequence occurs, and its ends."""
    positions = positions[positions <= len(tokens) - len(sequence)]
    for i in range(1, len(sequence)):
        positions = positions[tokens[positions + i] == sequence[i]]
    return np.stack([positions, positions + len(sequence)], axis=1)


def ranges_between(opening: np.ndarray, closing: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the ranges from the end of each opening match to the next closing match or the end of the document.

    Args:
        opening, closing: (matches, 2) from `find_sequences`. Matches across the end of a document are ignored.
        bounds: (documents + 1,) first token of each document, and the end of the last one.
    Returns:
        (ranges, 2) int64, ascending, disjoint and not empty.
    """
    opening = opening[opening[:, 1] <= _document_ends(opening[:, 0], bounds)]
    closing = closing[closing[:, 1] <= _document_ends(closing[:, 0], bounds)]
    starts = np.sort(opening[:, 1])
    next_closing = np.append(closing[:, 0], bounds[-1])[np.searchsorted(closing[:, 0], starts)]
    ends = np.minimum(next_closing, _document_ends(starts - 1, bounds))
    ends, first = np.unique(ends, return_index=True)  # an opening match inside a range does not begin another one
    starts = starts[first]
    return np.stack([starts, ends], axis=1)[starts < ends]


def _document_ends(positions: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    return bounds[np.searchsorted(bounds, positions, side="right")]
