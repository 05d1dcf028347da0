"""The program as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

TOOL = Path(__file__).parents[2] / "tools" / "json2binidx.py"


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_converts_with_the_world_tokenizer_by_default(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": "hello 你好\\n\\n"}\n', encoding="utf-8")
    done = run_tool("--input", "chat.jsonl", "--output_prefix", "data/chat", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar where there is no terminal
    assert "documents  1" in done.stdout
    assert np.fromfile(tmp_path / "data" / "chat.bin", "<u2").tolist() == [34550, 33, 10464, 11685, 261, 0]


def test_bad_input_is_one_line_and_a_failure(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    arguments = ("--input", "chat.jsonl", "--output_prefix", "chat", "--tokenizer", "bytes")
    done = run_tool(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: chat.jsonl:2: 'text' is not a text; found a number, expected a string.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]
    assert "Traceback" in run_tool(*arguments, "--debug", cwd=tmp_path).stderr


def test_help_needs_no_heavy_import(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["json2binidx.py", "--help"]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
except SystemExit:
    print("heavy:", sorted({{"torch", "tokenizers", "pyrwkv_tokenizer", "tqdm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "--output_prefix PREFIX" in done.stdout
    assert "heavy: []" in done.stdout


def test_a_neighbour_named_like_a_standard_module_is_not_imported(tmp_path):
    """tools/ gets an inspect.py: it must not stand in for the standard library's."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "json2binidx.py").write_bytes(TOOL.read_bytes())
    (tools / "inspect.py").write_text("raise SystemExit('the wrong inspect')")
    (tmp_path / "RWKV-PEFT").symlink_to(TOOL.parents[1] / "RWKV-PEFT")
    command = [sys.executable, str(tools / "json2binidx.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
