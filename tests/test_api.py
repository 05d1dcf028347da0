"""The Python API: light to import, documented, and docs/api.md works as it is printed."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rwkv_peft
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.errors import ConfigError
from rwkv_peft.inference.generate import generate as generate_ids
from tests.helpers import lively_model, with_shape, write_base

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = ["generate", "inject", "load", "merge", "train"]


def test_importing_the_package_is_light(tmp_path):
    code = "import sys, rwkv_peft; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)), dir(rwkv_peft))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "RWKV-PEFT")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("[] ["), done.stderr
    assert all(f"'{name}'" in done.stdout for name in FUNCTIONS)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rwkv_peft' has no attribute 'trian'"):
        _ = rwkv_peft.trian


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(getattr(rwkv_peft, name))
    assert re.search(rf"Example:\n(    .*\n)*    >>> .*\b{name}\(", text)
    assert f"`{name}(" in (ROOT / "docs/api.md").read_text(encoding="utf-8")


def test_the_examples_of_the_documentation_work(tmp_path, monkeypatch):
    """All code blocks of docs/api.md, in order, in a folder with a tiny base model and a few records."""
    write_base(tmp_path / "base.pth", with_shape(vocab_size=65536))
    records = [{"text": f"User: What is {n} + 2?\n\nAssistant: {n + 2}"} for n in range(40)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, names)
    assert names["result"].weights == Path("out/rwkv-0.safetensors")
    assert names["result"].proj_dir == Path("out")
    assert names["result"].steps == 10
    assert isinstance(names["answer"], str)
    assert names["logits"].shape == (1, 3, 65536)
    assert str(names["report"]).startswith("merged 16 layers (bone), 0 other parameters replaced")
    assert names["layers"] == ["0", "2"]
    names["torch"].testing.assert_close(
        names["merged"](names["torch"].tensor([[5, 7]]))[0], names["model"](names["torch"].tensor([[5, 7]]))[0]
    )


def test_text_is_generated_from_the_ids_of_its_tokenizer():
    model, tokenizer = lively_model(with_shape(vocab_size=257)).eval(), BytesTokenizer()
    text = rwkv_peft.generate(model, "Hi", tokenizer="bytes", max_tokens=9, temperature=0)
    ids = generate_ids(model, tokenizer.encode("Hi"), max_tokens=9, temperature=0, stop=0)
    assert text == tokenizer.decode(ids)
    assert text == rwkv_peft.generate(model, "Hi", tokenizer=tokenizer, max_tokens=9, temperature=0)


def test_a_tokenizer_that_does_not_fit_is_an_error():
    model = lively_model(with_shape(vocab_size=257)).eval()
    with pytest.raises(ConfigError, match=r"world has more token ids than the model's vocabulary; found 65536, .* 257"):
        rwkv_peft.generate(model, "Hi")
    with pytest.raises(ConfigError, match=r"empty; expected at least one token"):
        rwkv_peft.generate(model, "", tokenizer="bytes")
