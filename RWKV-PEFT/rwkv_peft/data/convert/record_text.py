"""Turns a record into the text of a document, in segments that are trained or not.

    plain        {"text": ...}, trained in full
    instruction  a question and its answer, under the keys of published sets (QUESTION_ANSWER_KEYS) or of --fields
    chat         `messages` (role, content) or `conversations` (from, value)

Instructions and chats become the chat form of RWKV World, `User: ...\\n\\nAssistant: ...\\n\\n`. Only the answers are
trained, each from its leading space to the blank line that ends it. A template can produce any other form.

Text is not changed, except in chats and instructions: white space around a message is removed, because the form has its
own, and line ends become `\\n`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson

from rwkv_peft.data.convert.jinja_template import Template
from rwkv_peft.errors import BadRecord, ConfigError

Segment = tuple[str, bool]
"""A piece of text, and whether predicting it is trained."""

QUESTION_ANSWER_KEYS = (
    ("instruction", "output"),  # alpaca, WizardLM-Evol-Instruct 70k
    ("instruction", "response"),  # dolly
    ("query", "response"),  # MetaMathQA
    ("query", "answer"),  # CodeFeedback-Filtered-Instruction
    ("question", "answer"),  # GSM8K
    ("problem", "solution"),  # MATH
    ("prompt", "completion"),
    ("prompt", "response"),
)
"""Keys of question and answer in published sets. The first two that a record has are used."""

CONTEXT_KEYS = ("input", "context")
"""Keys of text that belongs to an `instruction`. May be missing, null or empty."""

CHAT_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "User"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "Assistant"),
    "system": "System",
}

KNOWN_KEYS = "'text', 'messages', 'conversations', or two keys such as 'instruction' and 'output'"


@dataclass(frozen=True)
class RecordFormat:
    """How records are read. By default, a record is recognized by its keys.

    Chats and instructions are recognized before `text`, because some sets have a rendered copy in `text`.
    """

    text_key: str | None = None
    """Key of the text. All records are then plain text, and their other keys are ignored."""
    fields: tuple[str, str] | None = None
    """Keys of question and answer."""
    template: str | None = None
    """Source of a Jinja2 template; see jinja_template.py."""
    template_name: str = field(default="--template", compare=False)
    """The template's name in errors."""

    def __post_init__(self) -> None:
        if self.text_key is not None and self.fields:
            raise ConfigError("text_key", what="cannot be combined with --fields", hint="Omit one of the two.")

    def segments(self, record: Any) -> list[Segment]:
        """Return the document of a record as non-empty segments.

        Raises:
            BadRecord: the record has no text, or none under the expected keys.
        """
        if not isinstance(record, dict):
            expected = f'{{"{self.text_key or "text"}": "..."}}'
            raise BadRecord("the record is not a JSON object", found=json_type(record), expected=expected)
        segments = self._rendered(record) if self.template is not None else self._standard(record)
        for text, _ in segments:
            check_characters(text)
        return segments

    def _standard(self, record: Mapping[str, Any]) -> list[Segment]:
        messages = self._messages(record)
        return [(self._plain(record), True)] if messages is None else world_chat(messages)

    def _rendered(self, record: Mapping[str, Any]) -> list[Segment]:
        """Render the template. Invalid messages are an error only if the template uses `messages`."""
        messages, invalid = None, None
        try:
            messages = self._messages(record)
        except BadRecord as error:
            invalid = error
        try:
            return self._template.segments(record, messages)
        except BadRecord as error:
            raise invalid or error from error

    @cached_property
    def _template(self) -> Template:
        return Template(self.template or "", self.template_name)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, str]] | None:
        """Return role (User, Assistant or System) and content of each message; None if the record is plain text."""
        if self.fields is not None:
            return _question_and_answer(record, *self.fields)
        if self.text_key is not None:
            return None
        for key, (role, content) in CHAT_KEYS.items():
            if record.get(key) is not None:  # merged sets have null where another set has a value
                return _chat(record[key], key, role, content)
        for question, answer in QUESTION_ANSWER_KEYS:
            if question in record and answer in record:
                if record[question] is None and record[answer] is None:
                    continue
                return _question_and_answer(record, question, answer)
        return None

    def _plain(self, record: Mapping[str, Any]) -> str:
        key = self.text_key or "text"
        if key not in record:
            hint = "Give the key with --text_key, or the keys of question and answer with --fields."
            expected = repr(key) if self.text_key else KNOWN_KEYS
            raise BadRecord("no text", found=_key_list(record), expected=expected, hint=hint)
        text = _string(record[key], repr(key))
        if not text:
            raise BadRecord(f"{key!r} is empty", hint="Remove the record.")
        return text


def parse(raw: bytes) -> Any:
    """Return the JSON value in `raw`. If the fast parser fails, a tolerant one decides."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    # Windows editors begin a file with a byte order mark.
    text = decode(raw.removeprefix(codecs.BOM_UTF8)).rstrip()  # without the line break, an error is on this line
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"malformed JSON ({error.msg}, column {error.colno})"
        raise BadRecord(what, expected="one object per line", line_offset=error.lineno - 1) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"malformed JSON ({error})", expected="one object per line") from error


def decode(raw: bytes) -> str:
    """Return `raw` as text, or raise BadRecord for the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x} at column {error.start - line_start + 1}"
        hint = "Convert the file, for example: iconv -f latin1 -t utf-8"
        line_offset = raw.count(b"\n", 0, error.start)
        raise BadRecord("not UTF-8", found=found, hint=hint, line_offset=line_offset) from error


def check_characters(text: str) -> None:
    """Raise BadRecord if the text has a lone surrogate, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise BadRecord("the text has an incomplete character (a lone surrogate)", found=found) from error


def world_chat(messages: Sequence[Mapping[str, str]]) -> list[Segment]:
    """Return a chat in the form of RWKV World.

    `User: question\\n\\nAssistant:` is not trained, ` answer\\n\\n` is. Consecutive prompts become one segment.
    """
    segments: list[Segment] = []
    prompt = ""
    for message in messages:
        if message["role"] == "Assistant":
            segments += [(prompt + "Assistant:", False), (f" {message['content']}\n\n", True)]
            prompt = ""
        else:
            prompt += f"{message['role']}: {message['content']}\n\n"
    if not segments:
        raise BadRecord("no answer: no message has the role assistant")
    return [*segments, (prompt, False)] if prompt else segments


def _question_and_answer(record: Mapping[str, Any], question: str, answer: str) -> list[dict[str, str]]:
    missing = [key for key in (question, answer) if key not in record]
    if missing:
        raise BadRecord(f"no key {missing[0]!r}", found=_key_list(record), expected=f"{question!r} and {answer!r}")
    asked = _message(record[question], repr(question))
    if question == "instruction":
        for key in CONTEXT_KEYS:
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
        raise BadRecord(f"{key!r} is empty", hint="Remove the record.")
    messages = []
    for i, turn in enumerate(turns, start=1):
        name = f"message {i} of {key!r}"
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            found = _key_list(turn) if isinstance(turn, dict) else json_type(turn)
            raise BadRecord(
                f"{name} is not a valid message", found=found, expected=f"the keys {role_key!r} and {content_key!r}"
            )
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
        raise BadRecord(f"{name} is empty", hint="Remove the record.")
    return text


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} is not a string", found=json_type(value))
    return value


def _key_list(record: Mapping[str, Any]) -> str:
    return "keys " + ", ".join(record) if record else "no keys"


def json_type(value: Any) -> str:
    """Return the name of a value's type in JSON, for errors."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
