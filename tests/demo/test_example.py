"""The bare command's fallback on the demo's model and data."""

from __future__ import annotations

import pytest

from demo import corpus, example
from rwkv_peft.config import flags as cli
from rwkv_peft.config.sections import ModelConfig


@pytest.fixture
def empty_out(tmp_path, monkeypatch):
    """The demo's folder, empty, with the slow making of its files replaced by their names."""
    made = []
    monkeypatch.setattr(example, "BASE", tmp_path / "base.pth")
    monkeypatch.setattr(example, "CHAT", tmp_path / "chat")
    monkeypatch.setattr(example, "make_inputs", lambda: made.append(True))
    return tmp_path, made


def test_missing_inputs_are_made_and_the_users_flags_win(empty_out, capsys):
    folder, made = empty_out
    settings = example.with_demo_defaults(cli.parse_args(["--peft", "bone", "--micro_bsz", "2"]))
    assert made == [True]
    assert (settings["micro_bsz"], settings["dataload"], settings["peft"]) == (2, "pad", "bone")
    assert "using the demo's base and data" in capsys.readouterr().err
    (folder / "base.pth").touch()
    (folder / "chat.idx").touch()
    example.with_demo_defaults({})
    assert made == [True], "what is there is not made again"


def test_a_dry_run_makes_nothing(empty_out):
    settings = example.with_demo_defaults(cli.parse_args(["--peft", "bone", "--dry_run"]))
    assert empty_out[1] == []
    shape = cli.resolve(settings).model
    assert shape == ModelConfig(n_layer=4, n_embd=256, vocab_size=corpus.VOCAB_SIZE).resolved()


def test_the_texts_are_real_and_repeat():
    problems = list(corpus.math_problems(5, seed=1))
    assert problems == list(corpus.math_problems(5, seed=1))
    assert all(text.startswith("User: ") and "\n\nAssistant: " in text and "####" in text for text in problems)
    assert sum(len(text) for text in corpus.python_texts()) > 3_000_000
