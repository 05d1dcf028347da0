"""Shows tokens as text with the trained ones highlighted. The output is safe for a terminal, for any ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rwkv_peft.data.tokenizer import UNKNOWN, Tokenizer

END = "<end>"
"""Shown for the end-of-document token, which decodes to an empty string."""
RESET = "<reset>"
"""Shown before a token at which the state is reset."""
OPEN, CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
"""Around trained text if there are no colors."""
BOUNDARY = "\N{BOX DRAWINGS LIGHT VERTICAL}"

_HIGHLIGHT, _PLAIN = "\x1b[30;42m", "\x1b[0m"  # with a background color, trained spaces are visible too
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters except newline and tab, line separators, and characters that change the writing direction."""


@dataclass(frozen=True)
class TokenView:
    """Options for showing tokens.

    Args:
        tokenizer: decodes ids to text; None shows the ids.
        color: highlight trained text with a color instead of brackets.
        boundaries: show a line between tokens.
        limit: number of tokens to show; the rest is counted. None shows all.
    """

    tokenizer: Tokenizer | None
    color: bool = False
    boundaries: bool = False
    limit: int | None = 200

    def show(self, ids: np.ndarray, trained: np.ndarray | None = None, starts: Sequence[int] = ()) -> str:
        """Return lines, indented by two spaces.

        Args:
            ids: (N,) any integers.
            trained: (N,) bool, whether the token is in the loss; None highlights nothing.
            starts: positions at which the state is reset.
        """
        shown = [int(i) for i in ids[: self.limit]]
        marks = [False] * len(shown) if trained is None else [bool(mark) for mark in trained[: self.limit]]
        text = "".join(self._pieces(shown, marks, {int(position) for position in starts}))
        lines = text.removesuffix("\n").split("\n")
        if len(shown) < len(ids):
            lines.append(f"... {len(ids) - len(shown):,} more tokens")
        return "\n".join(f"  {line}".rstrip(" ") for line in lines)

    def _pieces(self, ids: list[int], marks: list[bool], starts: set[int]) -> Iterator[str]:
        """Yield the text of each run of tokens with the same mark."""
        segment = np.cumsum([i in starts for i in range(len(ids))]).tolist()
        for (_, marked), run in groupby(range(len(ids)), key=lambda i: (segment[i], marks[i])):
            positions = list(run)
            if positions[0] in starts:
                yield RESET
            elif positions[0] and (self.boundaries or self.tokenizer is None):
                yield self._separator()
            text = self._text(ids[positions[0] : positions[-1] + 1])
            yield self._marked(text) if marked else text

    def _marked(self, text: str) -> str:
        if not self.color:
            return f"{OPEN}{text}{CLOSE}"
        # Lines are colored separately, so that the indent stays plain and a trained newline is visible.
        lines = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n").split("\n")
        return "\n".join(f"{_HIGHLIGHT}{line}{_PLAIN}" if line else "" for line in lines)

    def _separator(self) -> str:
        return " " if self.tokenizer is None else BOUNDARY

    def _text(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        if self.boundaries:
            return BOUNDARY.join(map(self._token, ids))
        runs = groupby(ids, key=lambda i: i == self.tokenizer.eod)
        return "".join(
            END * len(list(run)) if end else escape_controls(self.tokenizer.decode(run)) for end, run in runs
        )

    def _token(self, i: int) -> str:
        """Return a token's text, or its id if it has no text, such as a part of a character."""
        if i == self.tokenizer.eod:
            return END
        text = self.tokenizer.decode([i])
        return f"<{i}>" if UNKNOWN in text else escape_controls(text)


def escape_controls(text: str) -> str:
    """Return `text` with control characters and characters that hide others written as \\x1b or \\u202e."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
