"""Cut a stream of JSON into the values of its array, or the values that follow one another, without holding it."""

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
"""A literal or an escape that the end of the buffer cuts is reported this close to it at most."""


def json_values(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """The line on which each value begins, counted from 1, and its text. Bytes that are not UTF-8 stay.

    Raises:
        BadRecord: the JSON is malformed, or ends in the middle; `lines_down` from line 1.
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
                raise scanner.malformed("the array does not go on: expected ',' or ']'")
            scanner.expect_end()
            return


class _Scanner:
    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        # Numbers stay text: they are only stepped over, and Python refuses to convert very long ones.
        self._scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
        self._text, self._at, self._line = "", 0, 0
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self) -> bool:
        """Read on, at least doubling what is left, so that a long value is not scanned over and over."""
        rest = self._text[self._at :]
        block = self._stream.read(max(_READ, len(rest)))
        self._text, self._at = rest + self._decode(block, final=not block), 0
        return bool(block)

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def at_end(self) -> bool:
        """Whether nothing but white space is left; stands at the next character otherwise."""
        while True:
            self._advance(_WHITE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text):
                return False
            if not self._more():
                return True

    def take(self, character: str) -> bool:
        """Step over `character` if it comes next."""
        if self.at_end() or self._text[self._at] != character:
            return False
        self._at += 1
        return True

    def value(self) -> tuple[int, bytes]:
        if self.at_end():
            raise self.malformed("the file ends in the middle of an array")
        while True:
            length, problem = self._value_length()
            if length is not None:
                break
            if problem is not None:
                raise problem
        line, raw = self._line + 1, self._text[self._at : self._at + length].encode("utf-8", "surrogateescape")
        self._advance(self._at + length)
        return line, raw

    def _value_length(self) -> tuple[int | None, BadRecord | None]:
        """Characters of the value that begins here, or what is wrong with it, or neither: there is more text now."""
        begin, whole = self._at, len(self._text)
        try:
            end = self._scan(self._text, begin)[1]
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= whole - _NEAR_END
            if cut and self._more():
                return None, None
            self._advance(self._at + error.pos - begin)
            return None, self.malformed(error.msg)
        except RecursionError:
            return None, self.malformed("nested too deep")
        # A number at the end may go on, also behind a point or an exponent without digits; nothing else does.
        if end > whole - _NEAR_END and self._text[end - 1] not in '}]"' and self._more():
            return None, None
        return end - begin, None

    def expect_end(self) -> None:
        if not self.at_end():
            raise self.malformed("something follows the end of the array")

    def malformed(self, found: str) -> BadRecord:
        return BadRecord("malformed JSON", found=found, lines_down=self._line)
