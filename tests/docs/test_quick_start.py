"""The quick starts in English and Chinese: the same commands, and a Python example that runs a merged model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rwkv_peft.config.sections import ModelConfig
from tests.helpers import write_base

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
README_ZH = (ROOT / "README_zh.md").read_text(encoding="utf-8")


def shell_lines(page: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


def test_both_languages_have_the_same_commands():
    english, chinese = shell_lines(README), shell_lines(README_ZH)
    assert [line for line in english if line not in chinese] == []
    extra = [line for line in chinese if line not in english]
    assert all("pip config" in line or "HF_ENDPOINT" in line for line in extra)


def test_the_python_example_runs(tmp_path):
    write_base(tmp_path / "merged.pth", ModelConfig(n_layer=2, n_embd=128, vocab_size=65536).resolved())
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    command = [sys.executable, "-c", code.replace("token_count=200", "token_count=3")]
    without_jit = {**os.environ, "RWKV_JIT_ON": "0"}  # compiling takes longer than the example
    subprocess.run(command, cwd=tmp_path, env=without_jit, check=True, capture_output=True)
    for line in code.splitlines():
        assert "#" in line or "User:" in line or line in README_ZH
