"""`rwkv-peft chat`: questions from standard input, answers on standard output."""

from __future__ import annotations

import io

import pytest

from rwkv_peft.commands import chat
from rwkv_peft.errors import UserError
from rwkv_peft.inference import text
from tests.helpers import with_shape, write_base


def test_each_line_is_answered_until_an_empty_one(tmp_path, monkeypatch, capsys):
    base = write_base(tmp_path / "base.pth", with_shape(vocab_size=257))
    prompts = []

    def answer(model, prompt, **options):
        prompts.append((prompt, options["seed"]))
        return f" It is {len(prompts)}.\n\nUser: What else?"

    monkeypatch.setattr(text, "generate", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n Two?\n\nThree?\n"))
    chat.main(["--model", str(base), "--tokenizer", "bytes"])
    assert prompts == [("User: One?\n\nAssistant:", 0), ("User: Two?\n\nAssistant:", 1)]
    out = capsys.readouterr().out
    assert out.startswith("Enter an empty line to end the chat.\n")
    assert "Assistant: It is 1.\n" in out
    assert "What else?" not in out


def test_the_end_of_the_input_ends_the_chat(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base.pth", with_shape(vocab_size=257))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    chat.main(["--model", str(base), "--tokenizer", "bytes", "--max_tokens", "3"])


def test_a_tokenizer_that_does_not_fit_is_reported_before_the_first_question(tmp_path):
    base = write_base(tmp_path / "base.pth", with_shape(vocab_size=257))
    with pytest.raises(UserError, match="--tokenizer: world has more token ids than the model's vocabulary"):
        chat.main(["--model", str(base)])


def test_a_model_is_required():
    with pytest.raises(UserError, match="the following arguments are required: --model"):
        chat.main([])
