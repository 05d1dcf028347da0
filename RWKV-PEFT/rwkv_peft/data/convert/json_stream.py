"""Splits a stream of JSON into the values of its array, or into consecutive values, without holding all of it."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator

from rwkv_peft.errors import BadRecord

_READ = 2**20
_WHITE = re.compile(r"[ \t\r\n]*")
_NEAR_END = 12
"""If the buffer ends inside a literal or an escape, the parser reports an error at most this far from the end."""


def json_values(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Yield the line on which each value begins, counted from 1, and its text. Bytes that are not UTF-8 are kept.

    Raises:
        BadRecord: the JSON is malformed or incomplete; its `line_offset` counts from line 1.
    """
    scanner = _Scanner(stream)
    in_array = scanner.take("[")
    if in_array and scanner.take("]"):
        scanner.expect_end()
        return
    while in_array or not scanner.at_end():
        yield scanner.value()
        if in_array and not scanner.take(","):
            if not scanner.take("]"):
                raise scanner.malformed("no ',' or ']' after an array element")
            scanner.expect_end()
            return


class _Scanner:
    """A buffer over the stream, with the current position and line."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        # Numbers stay text: they are only skipped, and Python refuses to convert very long ones.
        self._scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
        self._text, self._at, self._line = "", 0, 0
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self) -> bool:
        """Read more. The buffer at least doubles, so that a long value is not scanned too often."""
        rest = self._text[self._at :]
        block = self._stream.read(max(_READ, len(rest)))
        self._text, self._at = rest + self._decode(block, final=not block), 0
        return bool(block)

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def at_end(self) -> bool:
        """Return whether only white space is left. Otherwise move to the next character."""
        while True:
            self._advance(_WHITE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text):
                return False
            if not self._more():
                return True

    def take(self, character: str) -> bool:
        """Skip `character` if it is next, and return whether it was."""
        if self.at_end() or self._text[self._at] != character:
            return False
        self._at += 1
        return True

    def value(self) -> tuple[int, bytes]:
        """Skip the next value, and return its line and text."""
        if self.at_end():
            raise self.malformed("the end of the file inside an array")
        while True:
            length, error = self._value_length()
            if length is not None:
                break
            if error is not None:
                raise error
        line, raw = self._line + 1, self._text[self._at : self._at + length].encode("utf-8", "surrogateescape")
        self._advance(self._at + length)
        return line, raw

    def _value_length(self) -> tuple[int | None, BadRecord | None]:
        """Return the length of the value that begins here, or its error, or neither after reading more text."""
        begin, available = self._at, len(self._text)
        try:
            end = self._scan(self._text, begin)[1]
        except json.JSONDecodeError as error:
            incomplete = error.msg.startswith("Unterminated string") or error.pos >= available - _NEAR_END
            if incomplete and self._more():
                return None, None
            self._advance(self._at + error.pos - begin)
            return None, self.malformed(error.msg)
        except RecursionError:
            return None, self.malformed("too many nested brackets")
        # Only a number can continue after the end of the buffer, also after a point or an exponent without digits.
        if end > available - _NEAR_END and self._text[end - 1] not in '}]"' and self._more():
            return None, None
        return end - begin, None

    def expect_end(self) -> None:
        """Raise BadRecord unless only white space is left."""
        if not self.at_end():
            raise self.malformed("text after the end of the array")

    def malformed(self, found: str) -> BadRecord:
        """Return the error for the current line."""
        return BadRecord(f"malformed JSON ({found})", line_offset=self._line)
