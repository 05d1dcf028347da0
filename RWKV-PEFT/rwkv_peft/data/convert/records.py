"""One record to the text of one document, in segments that train or do not.

    plain        {"text": ...}                          all of it trains
    instruction  a question and its answer under the names that published sets use (PAIRS), or any two by --fields
    chat         `messages` (role, content) or `conversations` (from, value)

Instructions and chats become the chat form of RWKV World, `User: ...\\n\\nAssistant: ...\\n\\n`, in which only answers
train: each from its leading space to the blank line that ends it. A template gives any other form.

Text is kept as it is, except that in chats and instructions white space around a message goes (the form has its own)
and line ends become `\\n`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson

from rwkv_peft.data.convert.templates import Template
from rwkv_peft.errors import BadRecord, ConfigError

Segment = tuple[str, bool]
"""Text, and whether predicting it trains."""

PAIRS = (
    ("instruction", "output"),  # alpaca, WizardLM-Evol-Instruct 70k
    ("instruction", "response"),  # dolly
    ("query", "response"),  # MetaMathQA
    ("query", "answer"),  # CodeFeedback-Filtered-Instruction
    ("question", "answer"),  # GSM8K
    ("problem", "solution"),  # MATH
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Question and answer as published sets name them; the first pair that a record has both of is taken."""

CONTEXTS = ("input", "context")
"""Beside `instruction`: what the instruction is about. May be missing, null or empty."""

CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "User"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "Assistant"),
    "system": "System",
}

KNOWN_KEYS = "'text', 'messages', 'conversations', or a pair such as 'instruction' and 'output'"


@dataclass(frozen=True)
class Layout:
    """How records are read. Without any of these, a record is recognised by its keys; chats and instructions come
    before `text`, because some sets carry a rendered copy in `text`."""

    text_key: str | None = None
    """Key of the text; records are plain then, whatever else they carry."""
    fields: tuple[str, str] | None = None
    """Keys of question and answer."""
    template: str | None = None
    """Source of a Jinja2 template; see templates.py."""
    template_name: str = field(default="--template", compare=False)

    def __post_init__(self) -> None:
        if self.text_key is not None and self.fields:
            raise ConfigError("text_key", what="excludes --fields", hint="Give one of the two.")

    def segments(self, record: Any) -> list[Segment]:
        """The document of a record, none of its segments empty.

        Raises:
            BadRecord: it has no text, or not where it should be.
        """
        if not isinstance(record, dict):
            expected = f'{{"{self.text_key or "text"}": "..."}}'
            raise BadRecord("not an object", found=json_type(record), expected=expected)
        segments = self._rendered(record) if self.template is not None else self._standard(record)
        for text, _ in segments:
            check_characters(text)
        return segments

    def _standard(self, record: Mapping[str, Any]) -> list[Segment]:
        messages = self._messages(record)
        return [(self._plain(record), True)] if messages is None else world_form(messages)

    def _rendered(self, record: Mapping[str, Any]) -> list[Segment]:
        """A template may serve chats that the forms above do not: what is wrong counts once it asks for `messages`."""
        messages, problem = None, None
        try:
            messages = self._messages(record)
        except BadRecord as error:
            problem = error
        try:
            return self._template.segments(record, messages)
        except BadRecord as error:
            raise problem or error from error

    @cached_property
    def _template(self) -> Template:
        return Template(self.template or "", self.template_name)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, str]] | None:
        """role (User, Assistant or System) and content of each message; None where the record is plain text."""
        if self.fields is not None:
            return _pair(record, *self.fields)
        if self.text_key is not None:
            return None
        for key, (role, content) in CHATS.items():
            if record.get(key) is not None:  # tables that mix sets have a null where another set has a value
                return _chat(record[key], key, role, content)
        for question, answer in PAIRS:
            if question in record and answer in record:
                if record[question] is None and record[answer] is None:
                    continue
                return _pair(record, question, answer)
        return None

    def _plain(self, record: Mapping[str, Any]) -> str:
        key = self.text_key or "text"
        if key not in record:
            hint = "Name another key with --text_key, or two with --fields."
            expected = repr(key) if self.text_key else KNOWN_KEYS
            raise BadRecord("no text", found=_key_list(record), expected=expected, hint=hint)
        text = _string(record[key], repr(key))
        if not text:
            raise BadRecord(f"{key!r} is empty", hint="Remove it.")
        return text


def parse(raw: bytes) -> Any:
    """The JSON value in `raw`. What the fast parser refuses goes to the tolerant one, whose verdict counts."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    # Windows editors begin a file with a byte order mark.
    text = decode(raw.removeprefix(codecs.BOM_UTF8))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed JSON", found=error, expected="one object on a line") from error


def decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x} at column {error.start - line_start + 1}"
        hint = "Convert the file with: iconv -t utf-8"
        lines_down = raw.count(b"\n", 0, error.start)
        raise BadRecord("not UTF-8", found=found, hint=hint, lines_down=lines_down) from error


def check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise BadRecord("half a character (a lone surrogate) in the text", found=found) from error


def world_form(messages: Sequence[Mapping[str, str]]) -> list[Segment]:
    """`User: question\\n\\nAssistant:` does not train, ` answer\\n\\n` does. Prompts in a row become one segment."""
    segments: list[Segment] = []
    prompt = ""
    for message in messages:
        if message["role"] == "Assistant":
            segments += [(prompt + "Assistant:", False), (f" {message['content']}\n\n", True)]
            prompt = ""
        else:
            prompt += f"{message['role']}: {message['content']}\n\n"
    if not segments:
        raise BadRecord("no answer: no message is the assistant's")
    return [*segments, (prompt, False)] if prompt else segments


def _pair(record: Mapping[str, Any], question: str, answer: str) -> list[dict[str, str]]:
    missing = [key for key in (question, answer) if key not in record]
    if missing:
        raise BadRecord(f"no {missing[0]!r}", found=_key_list(record), expected=f"{question!r} and {answer!r}")
    asked = _message(record[question], repr(question))
    if question == "instruction":
        for key in CONTEXTS:
            if record.get(key):
                asked += "\n" + _message(record[key], repr(key))
    return [
        {"role": "User", "content": asked},
        {"role": "Assistant", "content": _message(record[answer], repr(answer))},
    ]


def _chat(turns: Any, key: str, role_key: str, content_key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list):
        raise BadRecord(f"{key!r} is not a list of messages", found=json_type(turns))
    if not turns:
        raise BadRecord(f"{key!r} is empty", hint="Remove it.")
    messages = []
    for i, turn in enumerate(turns, start=1):
        name = f"message {i} of {key!r}"
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            found = _key_list(turn) if isinstance(turn, dict) else json_type(turn)
            raise BadRecord(f"{name} is none", found=found, expected=f"{role_key!r} and {content_key!r}")
        role = turn[role_key]
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            raise BadRecord(f"{name} has an unknown {role_key!r}", found=repr(role), expected=", ".join(ROLES))
        if known == "System" and turn[content_key] in ("", None):
            continue
        messages.append({"role": known, "content": _message(turn[content_key], f"{content_key!r} of {name}")})
    return messages


def _message(value: Any, name: str) -> str:
    text = _string(value, name).replace("\r\n", "\n").strip()
    if not text:
        raise BadRecord(f"{name} is empty", hint="Remove it.")
    return text


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} is not a text", found=json_type(value), expected="a string")
    return value


def _key_list(record: Mapping[str, Any]) -> str:
    return "keys " + ", ".join(record) if record else "no keys"


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
