"""The record formats of published sets. The records are our own; the keys are those of the sets."""

from __future__ import annotations

import pytest

from rwkv_peft.data.convert.jinja_template import Template
from rwkv_peft.data.convert.record_text import RecordFormat, parse
from rwkv_peft.errors import BadRecord, ConfigError

ASKED, ANSWERED = "What is 2 + 3?", "2 + 3 = 5\n#### 5"
PUBLISHED = {
    "MetaMathQA": {"type": "GSM_AnsAug", "query": ASKED, "original_question": "2+3?", "response": ANSWERED},
    "GSM8K": {"question": ASKED, "answer": ANSWERED},
    "MATH": {"problem": ASKED, "level": "Level 1", "type": "Algebra", "solution": ANSWERED},
    "MATH-500": {"problem": ASKED, "solution": ANSWERED, "answer": "5", "subject": "Algebra", "level": 1},
    "CodeFeedback": {"query": ASKED, "answer": ANSWERED, "resource": "evol", "lang": "python"},
    "CodeFeedback, several turns": {
        "id": 1,
        "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}],
    },
    "WizardLM-Evol-Instruct 70k": {"instruction": ASKED, "output": ANSWERED},
    "WizardLM-Evol-Instruct V2": {
        "idx": "a1",
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}],
    },
    "alpaca": {"instruction": ASKED, "input": "", "output": ANSWERED},
    "alpaca with its rendered text": {"instruction": ASKED, "input": "", "output": ANSWERED, "text": "Below is ..."},
    "dolly": {"instruction": ASKED, "context": None, "response": ANSWERED, "category": "qa"},
}
EXPECTED = [(f"User: {ASKED}\n\nAssistant:", False), (f" {ANSWERED}\n\n", True)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_are_recognized(name):
    assert RecordFormat().segments(PUBLISHED[name]) == EXPECTED


def test_an_input_follows_the_instruction():
    record = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    assert RecordFormat().segments(record)[0] == ("User: Translate.\nGuten Tag\n\nAssistant:", False)


def test_a_chat_of_several_turns():
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": " Hi\r\nthere \n"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Bye.\n\nCome back."},
            {"role": "user", "content": "..."},
        ]
    }
    assert RecordFormat().segments(record) == [
        ("System: Be brief.\n\nUser: Hi\nthere\n\nAssistant:", False),
        (" Hello.\n\n", True),
        ("User: Bye\n\nAssistant:", False),
        (" Bye.\n\nCome back.\n\n", True),
        ("User: ...\n\n", False),
    ]


def test_an_empty_system_message_is_left_out():
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
    assert RecordFormat().segments({"conversations": turns}) == EXPECTED


def test_nulls_in_merged_sets_are_ignored():
    nulls = {"messages": None, "conversations": None, "instruction": None, "output": None}
    assert RecordFormat().segments({**nulls, "text": "t"}) == [("t", True)]
    assert RecordFormat().segments({**nulls, **PUBLISHED["GSM8K"], "text": None}) == EXPECTED
    with pytest.raises(BadRecord) as caught:
        RecordFormat().segments({"question": "q", "answer": None, "text": "t"})
    assert "'answer' is not a string; found null" in caught.value.reason


def test_fields_and_text_key_decide_before_recognition():
    record = {"question": "q", "answer": "a", "claim": ASKED, "proof": ANSWERED, "text": "t"}
    assert RecordFormat(fields=("claim", "proof")).segments(record) == EXPECTED
    assert RecordFormat(text_key="text").segments(record) == [("t", True)]
    assert RecordFormat(text_key="claim").segments(record) == [(ASKED, True)]


def test_plain_text_is_unchanged():
    assert RecordFormat().segments({"text": " a\r\n\n"}) == [(" a\r\n\n", True)]


USER = {"role": "user", "content": "q"}
BAD = {
    "empty question": ({"question": " \n", "answer": "a"}, "'question' is empty"),
    "answer is a number": ({"question": "q", "answer": 5}, "'answer' is not a string; found a number"),
    "input is a list": ({"instruction": "q", "input": ["x"], "output": "a"}, "'input' is not a string; found a list"),
    "chat is a text": ({"messages": "hello"}, "'messages' is not a list of messages; found a string"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "message is a text": ({"messages": ["hello"]}, "message 1 of 'messages' is not a valid message; found a string"),
    "wrong keys": ({"messages": [{"from": "user"}]}, "found keys from, expected the keys 'role' and 'content'"),
    "unknown role": ({"messages": [USER, {"role": "tool", "content": "x"}]}, "message 2 of 'messages' has an unknown"),
    "role is a list": ({"messages": [{"role": [], "content": "x"}]}, "unknown 'role'"),
    "no answer": ({"messages": [USER]}, "no answer"),
    "empty answer": (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        "'content' of message 2 of 'messages' is empty",
    ),
    "surrogate": ({"question": "q", "answer": "\ud83d"}, "lone surrogate"),
    "half a pair": ({"question": "q"}, "no text; found keys question"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_records_say_what_is_wrong(case):
    record, message = BAD[case]
    with pytest.raises(BadRecord) as caught:
        RecordFormat().segments(record)
    assert message in caught.value.reason


def test_a_missing_field_is_reported():
    with pytest.raises(BadRecord) as caught:
        RecordFormat(fields=("a", "b")).segments({"a": "x", "c": "y"})
    assert caught.value.reason == "no key 'b'; found keys a, c, expected 'a' and 'b'."


def test_json_that_only_the_tolerant_parser_accepts():
    assert parse(b'{"text": "a", "score": NaN}')["text"] == "a"
    assert parse(b'\xef\xbb\xbf{"text": "a"}') == {"text": "a"}


TEMPLATE = """\
{% for message in messages %}
<{{ message.role }}>
{% if message.role == "Assistant" %}
{{ answer_begin }}{{ message.content }}<end>{{ answer_end }}

{% else %}
{{ message.content }}
{% endif %}
{% endfor %}
"""


def test_a_template_renders_text_and_marks():
    assert RecordFormat(template=TEMPLATE).segments(PUBLISHED["GSM8K"]) == [
        (f"<User>\n{ASKED}\n<Assistant>\n", False),
        (f"{ANSWERED}<end>", True),
        ("\n\n", False),
    ]
    assert RecordFormat(template="{{ record.a }}!").segments({"a": "x"}) == [("x!", True)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ record.b }}", "fails on this record; found 'dict object' has no attribute 'b'"),
        ("{{ messages }}", "'messages' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ record.__class__.__mro__ }}", "unsafe"),
        ("{{ record.update({}) }}", "access to attribute 'update' of 'dict' object is unsafe."),
        ("{{ answer_end }}x", "do not alternate"),
        ("{{ answer_begin }}x{{ answer_begin }}y{{ answer_end }}{{ answer_end }}", "do not alternate"),
        ("{{ answer_begin }}x", "do not alternate"),
        ("{{ answer_begin }}{{ answer_end }}", "renders no text"),
        ("\ud83d", "lone surrogate"),
    ],
)
def test_a_template_that_fails_is_an_invalid_record(template, message):
    with pytest.raises(BadRecord) as caught:
        RecordFormat(template=template).segments({"a": "x"})
    assert message in caught.value.reason


def test_a_template_accepts_chats_that_the_world_form_does_not():
    chat = {"messages": [{"role": "tool", "content": "x"}]}
    template = "{{ record.messages[0].role }}"
    assert RecordFormat(template=template).segments(chat) == [("tool", True)]
    with pytest.raises(BadRecord) as caught:
        RecordFormat(template="{{ messages[0].role }}").segments(chat)
    assert "unknown 'role'" in caught.value.reason


def test_a_record_cannot_contain_the_marks():
    seen = RecordFormat(template="{{ answer_begin }}").segments
    with pytest.raises(BadRecord):
        seen({})
    one, other = Template("", "a"), Template("", "a")
    assert one._begin != other._begin


def test_a_syntax_error_in_a_template_is_reported_with_its_line():
    with pytest.raises(ConfigError, match=r"--template chat\.j2: has a syntax error; found line 2: "):
        Template("fine\n{% if %}", "chat.j2")
