"""`--sample_prompts`: the texts are what the model generates, and writing them does not affect training."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_peft.adapted_model import load_plain, load_with_adapter
from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.data.inspect.token_view import escape_controls
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import UserError
from rwkv_peft.inference.generate import generate
from rwkv_peft.training import sample_texts
from rwkv_peft.training.sample_texts import read_prompts
from tests.training.small_runs import train, write_inputs

LORA = ["--peft", "lora", "--lora_config", '{"r":8,"dropout":0.5}']
"""With dropout, which completions must not use or draw random numbers for."""
LENGTH = 20
PROMPT = "User: What is 1 plus 2?\n\nAssistant:"


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path)


def prompts_of(folder: Path, text: str, **more: str) -> list[str]:
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    return read_prompts(TrainConfig(sample_prompts=f"{folder}/prompts.txt", **more))


def test_a_prompt_is_a_line_or_json(tmp_path):
    text = '\ufeffUser: Hi\\n\\nAssistant:\r\n\n  spaces \n{"prompt": "{\\u00fc}\\n\\\\n"}\nC:\\\\new\nlast'
    assert prompts_of(tmp_path, text) == ["User: Hi\n\nAssistant:", "  spaces ", "{ü}\n\\n", "C:\\new", "last"]
    assert read_prompts(TrainConfig()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", r"--sample_prompts: .*prompts.txt has no prompts; expected one per line"),
        ("good\n{bad}", r"prompts.txt:2: not a prompt; found {bad}, expected"),
        ('{"text": "x"}', r"prompts.txt:1: not a prompt"),
        ('{"prompt": 5}', r"prompts.txt:1: not a prompt"),
        ('{"prompt": "\\ud800"}', r"prompts.txt:1: not a prompt"),
        ('{"prompt": ""}', r"prompts.txt:1: an empty prompt"),
    ],
)
def test_errors_of_bad_prompts(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path, text)


def test_errors_come_before_the_model_is_loaded(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_peft.training.run.prepare", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "prompts.txt").write_text("x")
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        train(tmp_path / "run", inputs, "--sample_prompts", f"{tmp_path}/gone.txt")
    with pytest.raises(UserError, match="deepspeed_stage_3 shards the model"):
        train(
            tmp_path / "run", inputs, "--sample_prompts", f"{tmp_path}/prompts.txt", "--strategy", "deepspeed_stage_3"
        )


def test_samples_are_greedy_and_do_not_affect_training(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample_texts, "SAMPLE_TOKENS", LENGTH)
    (tmp_path / "prompts.txt").write_text(PROMPT.replace("\n", "\\n") + "\n")
    more = ["--lr_init", "3e-3", "--lr_final", "3e-3", "--epoch_steps", "8", *LORA]
    plain = train(tmp_path / "plain", inputs, *more)
    capsys.readouterr()
    rows = train(tmp_path / "run", inputs, *more, "--sample_prompts", f"{tmp_path}/prompts.txt")
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    printed = capsys.readouterr().out
    adapter = f"{tmp_path}/run/rwkv-0.safetensors"
    for title, model in (
        ("before training", load_plain(inputs[1])),
        ("after step 8", load_with_adapter(inputs[1], adapter).model),
    ):
        expected = text_of(model.eval())
        assert f"--- {title}\n{expected}\n" in printed
    assert printed.index("before training") < printed.index("after step 8")


def text_of(model) -> str:
    """Return the greedy completion of the prompt, in printable form."""
    tokenizer = load_tokenizer("bytes")
    return escape_controls(
        tokenizer.decode(generate(model, tokenizer.encode(PROMPT), max_tokens=LENGTH, temperature=0))
    )


def test_the_data_must_name_its_tokenizer(inputs, tmp_path):
    (tmp_path / "prompts.txt").write_text("x")
    meta = tmp_path / "data.meta.json"
    flags = ["--sample_prompts", f"{tmp_path}/prompts.txt"]
    meta.write_text(meta.read_text().replace('"tokenizer_spec": "bytes"', '"tokenizer_spec": "gone.json"'))
    with pytest.raises(UserError, match=r"the data's tokenizer gone\.json cannot be loaded"):
        train(tmp_path / "run", inputs, *flags)
    meta.write_text(meta.read_text().replace("gone.json", "world"))
    with pytest.raises(UserError, match="world has changed since the data was converted"):
        train(tmp_path / "run", inputs, *flags)
    meta.unlink()
    with pytest.raises(UserError, match="--sample_prompts: the data does not name its tokenizer"):
        train(tmp_path / "run", inputs, *flags)
    assert not (tmp_path / "run").exists()
