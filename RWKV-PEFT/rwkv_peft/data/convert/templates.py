"""Jinja2 templates that turn a record into a document, and mark in it what trains.

A template sees `record`, and `messages` where the record is a chat or an instruction (each with `role`: User, Assistant
or System, and `content`). What stands between `{{ answer_begin }}` and `{{ answer_end }}` trains; without these marks
all of it does. The end of the document trains when an answer comes last. Line breaks after block tags are dropped, as
in Hugging Face's chat templates, and so is the last one of the file. Templates run in a sandbox: they reach their
record and nothing else.
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
    """The source of a template; its mistakes show here, before any record is read.

    Raises:
        ConfigError: no such UTF-8 file, or as `Template` has it.
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
        ConfigError: Jinja2 is not installed, or does not understand the source.
    """

    def __init__(self, source: str, name: str) -> None:
        if find_spec("jinja2") is None:
            raise ConfigError("template", what="needs the package Jinja2", hint="pip install jinja2")
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._error = TemplateError
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ConfigError("template", name, what="not a Jinja2 template", found=f"line {line}: {error}") from error
        key = secrets.token_hex(8)  # so that no record can spell the marks; they never reach the output
        self._begin, self._end = f"\ufdd0{key}<", f"\ufdd0{key}>"
        self._marks = re.compile(f"({self._begin}|{self._end})")

    def segments(
        self, record: Mapping[str, Any], messages: Sequence[Mapping[str, str]] | None
    ) -> list[tuple[str, bool]]:
        """The document in segments, each with whether it trains; none is empty.

        Raises:
            BadRecord: the template fails on this record, gives nothing, or its marks do not alternate.
        """
        names: dict[str, Any] = {"record": record, "answer_begin": self._begin, "answer_end": self._end}
        if messages is not None:
            names["messages"] = messages
        try:
            text = self._template.render(names)
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as e:
            raise BadRecord("the template fails on this record", found=str(e).rstrip(".")) from e
        pieces = self._marks.split(text)
        if pieces[1::2] != [self._begin, self._end] * (len(pieces) // 4):
            raise BadRecord("answer_begin and answer_end of the template do not alternate")
        everything = len(pieces) == 1
        segments = [(piece, everything or i % 4 == 2) for i, piece in enumerate(pieces) if i % 2 == 0 and piece]
        if not segments:
            raise BadRecord("the template gives no text")
        return segments
