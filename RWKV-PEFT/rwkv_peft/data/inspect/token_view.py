"""Tokens for the eye: their text, with what trains marked, safe for a terminal whatever the ids are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rwkv_peft.data.tokenizer import UNKNOWN, Tokenizer

END = "<end>"
"""Shown for the token that ends a document, which decodes to nothing."""
RESET = "<reset>"
"""Shown before a token at which the state begins anew."""
OPEN, CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Around trained text where there is no colour."""
BOUNDARY = "\N{BOX DRAWINGS LIGHT VERTICAL}"

_HIGHLIGHT, _PLAIN = "\x1b[30;42m", "\x1b[0m"  # a background shows trained spaces too
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters but newline and tab, and those that break lines or turn the writing direction."""


@dataclass(frozen=True)
class TokenView:
    """How tokens are shown.

    Args:
        tokenizer: turns ids into text; None shows the ids.
        color: highlight what trains, instead of brackets around it.
        boundaries: a stroke between tokens.
        limit: tokens of which more are only counted; None shows all.
    """

    tokenizer: Tokenizer | None
    color: bool = False
    boundaries: bool = False
    limit: int | None = 200

    def show(self, ids: np.ndarray, trained: np.ndarray | None = None, starts: Sequence[int] = ()) -> str:
        """Lines, indented by two spaces.

        Args:
            ids: (N,) any integers.
            trained: (N,) bool: whether predicting the token trains; None marks nothing.
            starts: places at which the state begins anew.
        """
        shown = [int(i) for i in ids[: self.limit]]
        marks = [False] * len(shown) if trained is None else [bool(mark) for mark in trained[: self.limit]]
        text = "".join(self._pieces(shown, marks, {int(place) for place in starts}))
        lines = text.removesuffix("\n").split("\n")
        if len(shown) < len(ids):
            lines.append(f"... {len(ids) - len(shown):,} more tokens")
        return "\n".join(f"  {line}".rstrip(" ") for line in lines)

    def _pieces(self, ids: list[int], marks: list[bool], starts: set[int]) -> Iterator[str]:
        """Text of each run of tokens that are marked alike."""
        segment = np.cumsum([place in starts for place in range(len(ids))]).tolist()
        for (_, marked), run in groupby(range(len(ids)), key=lambda place: (segment[place], marks[place])):
            places = list(run)
            if places[0] in starts:
                yield RESET
            elif places[0] and (self.boundaries or self.tokenizer is None):
                yield self._joint()
            text = self._text(ids[places[0] : places[-1] + 1])
            yield self._marked(text) if marked else text

    def _marked(self, text: str) -> str:
        if not self.color:
            return f"{OPEN}{text}{CLOSE}"
        # Each line is coloured by itself: the indent between them stays plain, and a trained newline can be seen.
        lines = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n").split("\n")
        return "\n".join(f"{_HIGHLIGHT}{line}{_PLAIN}" if line else "" for line in lines)

    def _joint(self) -> str:
        return " " if self.tokenizer is None else BOUNDARY

    def _text(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        if self.boundaries:
            return BOUNDARY.join(map(self._token, ids))
        runs = groupby(ids, key=lambda i: i == self.tokenizer.eod)
        return "".join(END * len(list(run)) if end else safe(self.tokenizer.decode(run)) for end, run in runs)

    def _token(self, i: int) -> str:
        """One token's text; its number where it has none of its own, as with a part of a character."""
        if i == self.tokenizer.eod:
            return END
        text = self.tokenizer.decode([i])
        return f"<{i}>" if UNKNOWN in text else safe(text)


def safe(text: str) -> str:
    """`text` with the characters that could upset a terminal, or hide others, spelled out as \\x1b or \\u202e."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
