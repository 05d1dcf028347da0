"""Where a marker such as `Assistant:` stands in a stream of tokens, and what lies between two kinds of markers."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

import numpy as np

from rwkv_peft.data.tokenizer import Tokenizer

_NEIGHBOURS = ("", " ", "\n", "\n\n", *string.punctuation, "**", "--", "://", "</", "..", "!!", "??", "```")
"""What may stand beside a marker and share a token with it: `:` and `\"` are one token in `Assistant:"`."""

_CHUNK = 2**24

Sequences = list[tuple[int, ...]]


def spellings(tokenizer: Tokenizer, marker: str) -> Sequences:
    """Token sequences that `marker` may be, between all usual neighbours; the tokens it shares with them included.

    A letter or digit right beside it makes it a part of another word and is not looked for.
    """
    found = {tuple(tokenizer.encode(marker))}
    for before in _NEIGHBOURS:
        for after in ("x", *_NEIGHBOURS):
            found |= _covering(tokenizer, before, marker, after)
    return sorted(found)


def _covering(tokenizer: Tokenizer, before: str, marker: str, after: str) -> set[tuple[int, ...]]:
    """The tokens of before + marker + after that hold some of the marker; none where the text does not come back."""
    ids = tokenizer.encode(before + marker + after)
    if tokenizer.decode(ids) != before + marker + after:
        return set()
    ends = np.array([len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))])
    first = int(np.searchsorted(ends, len(before), side="right"))
    last = int(np.searchsorted(ends, len(before) + len(marker), side="left"))
    return {tuple(ids[first : last + 1])}


def find(tokens: np.ndarray, sequences: Iterable[Sequence[int]]) -> np.ndarray:
    """(matches, 2) int64: first and one past the last token of every occurrence, by their first token."""
    by_first: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        by_first.setdefault(sequence[0], []).append(np.asarray(sequence))
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(tokens), _CHUNK):
        for first, group in by_first.items():
            places = start + np.flatnonzero(tokens[start : start + _CHUNK] == first)
            found += [_verified(tokens, places, sequence) for sequence in group]
    matches = np.concatenate(found)
    return matches[np.lexsort((matches[:, 1], matches[:, 0]))]


def _verified(tokens: np.ndarray, places: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    places = places[places <= len(tokens) - len(sequence)]
    for i in range(1, len(sequence)):
        places = places[tokens[places + i] == sequence[i]]
    return np.stack([places, places + len(sequence)], axis=1)


def between(opening: np.ndarray, closing: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """From after each opening match to before the next closing one, or to the end of the document.

    Args:
        opening, closing: (matches, 2) as `find` gives them; those that cross the end of a document do not count.
        bounds: (documents + 1,) where documents begin.
    Returns:
        (ranges, 2) int64, ascending and apart from one another; none is empty.
    """
    opening = opening[opening[:, 1] <= _document_ends(opening[:, 0], bounds)]
    closing = closing[closing[:, 1] <= _document_ends(closing[:, 0], bounds)]
    starts = np.sort(opening[:, 1])
    next_closing = np.append(closing[:, 0], bounds[-1])[np.searchsorted(closing[:, 0], starts)]
    ends = np.minimum(next_closing, _document_ends(starts - 1, bounds))
    ends, first = np.unique(ends, return_index=True)  # an opening inside an open range begins no other
    starts = starts[first]
    return np.stack([starts, ends], axis=1)[starts < ends]


def _document_ends(places: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    return bounds[np.searchsorted(bounds, places, side="right")]
