"""The user's Jinja2 template (`--template`), which turns a record into a document and marks its trained text.

A template has the variables `record` and, for chats and instructions, `messages` (each with `role`: User, Assistant or
System, and `content`). The text between `{{ answer_begin }}` and `{{ answer_end }}` is in the loss; without these
marks, all text is. The end-of-document token is in the loss if an answer comes last. Line breaks after block tags are
removed, as in Hugging Face's chat templates, and so is the last line break of the file. Templates run in a sandbox and
can access only their record.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rwkv_peft.errors import BadRecord, ConfigError


def read_template(path: str) -> str:
    """Return the source of a template, after checking its syntax.

    Raises:
        ConfigError: there is no such UTF-8 file, or `Template` raises it.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("template", what="cannot be read", found=error, expected="a UTF-8 text file") from error
    Template(source, path)
    return source


class Template:
    """A compiled template.

    Raises:
        ConfigError: Jinja2 is not installed, or the source has a syntax error.
    """

    def __init__(self, source: str, name: str) -> None:
        if find_spec("jinja2") is None:
            raise ConfigError("template", what="needs the package Jinja2", hint="Run: pip install jinja2")
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._error = TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ConfigError("template", name, what="has a syntax error", found=f"line {line}: {error}") from error
        key = secrets.token_hex(8)  # no record can contain the marks; they are removed below
        self._begin, self._end = f"\ufdd0{key}<", f"\ufdd0{key}>"
        self._marks = re.compile(f"({self._begin}|{self._end})")

    def segments(
        self, record: Mapping[str, Any], messages: Sequence[Mapping[str, str]] | None
    ) -> list[tuple[str, bool]]:
        """Return the document as non-empty segments, each with whether it is trained.

        Args:
            record: the record.
            messages: role and content of each message; None if the record is neither a chat nor an instruction.
        Raises:
            BadRecord: the template fails on this record or renders no text, or its marks do not alternate.
        """
        variables: dict[str, Any] = {"record": record, "answer_begin": self._begin, "answer_end": self._end}
        if messages is not None:
            variables["messages"] = messages
        try:
            text = self._template.render(variables)
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as e:
            raise BadRecord("the template fails on this record", found=str(e).rstrip(".")) from e
        pieces = self._marks.split(text)
        if pieces[1::2] != [self._begin, self._end] * (len(pieces) // 4):
            raise BadRecord("answer_begin and answer_end do not alternate in the rendered template")
        unmarked = len(pieces) == 1
        segments = [(piece, unmarked or i % 4 == 2) for i, piece in enumerate(pieces) if i % 2 == 0 and piece]
        if not segments:
            raise BadRecord("the template renders no text")
        return segments
