"""`rwkv-peft inspect`, started by tools/inspect_data.py as a user does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import WorldTokenizer
from tests.data.pairs import write_mask

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "inspect_data.py"


def run_tool(*arguments: object, cwd: Path, tool: Path = TOOL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tool), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=60)


@pytest.fixture
def chat(tmp_path) -> Path:
    """A folder with `chat`: three documents of World tokens, with the answers in the loss."""
    texts = ("User: 你好\n\nA:", " hello"), ("User: 1+1\n\nA:", " 2"), ("User: \x1b[2J\n\nA:", " ok")
    tokenizer, mask = WorldTokenizer(), b""
    with BinidxWriter(tmp_path / "chat", tokenizer) as writer:
        for question, answer in texts:
            prompt, reply = tokenizer.encode(question), [*tokenizer.encode(answer), 0]
            writer.add_document([*prompt, *reply])
            mask += bytes(len(prompt)) + b"\1" * len(reply)
    write_mask(str(tmp_path / "chat"), mask)
    return tmp_path


def test_shows_a_pair_its_documents_and_the_first_batch(chat):
    flags = "--check --documents 0-1 --batches 1 --dataload pad --ctx_len 16 --micro_bsz 2 --color never".split()
    done = run_tool("chat", *flags, cwd=chat)
    assert (done.returncode, done.stderr) == (0, "")
    assert "documents  3\n" in done.stdout
    assert "vocabulary of 65,536\n" in done.stdout
    assert "\n  User: 你好\n\n  A:⟦ hello<end>⟧\n" in done.stdout
    assert "\n  A:⟦ 2<end>⟧\n" in done.stdout
    assert done.stdout.count("\nbatch 0, row ") == 2
    assert "not in the loss" in done.stdout


def test_color_is_used_only_on_terminals_unless_requested(chat):
    assert "\x1b" not in run_tool("chat", "--documents", "0-2", cwd=chat).stdout
    assert "\x1b[30;42m hello<end>\x1b[0m" in run_tool("chat", "--documents", "0", "--color=always", cwd=chat).stdout


def test_long_documents_are_shortened_unless_full_is_given(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 999}))
    words = ("--input", "long.jsonl", "--output_prefix", "long", "--tokenizer", "bytes")
    assert run_tool(*words, cwd=tmp_path, tool=ROOT / "tools" / "json2binidx.py").returncode == 0
    assert run_tool("long", "--documents", "0", cwd=tmp_path).stdout.endswith("\n  ... 4,796 more tokens\n")
    assert run_tool("long", "--documents", "0", "--full", cwd=tmp_path).stdout.count("word") == 999


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--documents", "1-3"], "--documents: there is no document 3; the last is 2."),
        (["--vocab_size", "33"], "chat.bin: a token id is outside the vocabulary; found 24281 at token 0"),
        (["--vocab_size", "0"], "--vocab_size: invalid value; found 0, expected an integer of at least 1."),
        (["--batches", "1", "--random_seed", "-1"], "--random_seed: invalid value; found -1"),
        (["--ctx_len", "0"], "--ctx_len: invalid value; found 0"),
        (["--nonsense"], f"unexpected argument '--nonsense'. See python {TOOL} --help."),
        (["--tokenizer", "wrld"], "--tokenizer: invalid value; found 'wrld'"),
    ],
)
def test_mistakes_are_one_line(chat, words, message):
    done = run_tool("chat", *words, cwd=chat)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_damaged_file_is_named_in_one_line(chat):
    (chat / "chat.mask.bin").write_bytes(b"\3")
    done = run_tool("chat", cwd=chat)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: chat.mask.bin: wrong size")
    assert "Traceback" in run_tool("chat", "--debug", cwd=chat).stderr


def test_the_data_flags_are_those_of_training(tmp_path):
    text = run_tool("--help", cwd=tmp_path).stdout
    wanted = {spec.name for spec in fields(DataConfig)} - {"data_file", "val_data_file"}
    assert wanted
    assert [name for name in wanted if f"--{name} " not in text] == []


def test_batches_do_not_contain_validation_documents(tmp_path):
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"({i})"}) + "\n" for i in range(100)))
    words = ("--input", "many.jsonl", "--output_prefix", "many", "--tokenizer", "bytes")
    assert run_tool(*words, cwd=tmp_path, tool=ROOT / "tools" / "json2binidx.py").returncode == 0
    flags = "--batches 1 --micro_bsz 100 --dataload pad --ctx_len 8".split()
    whole, part = (
        set(re.findall(r"\d+\)<end>", run_tool("many", *flags, *more, cwd=tmp_path).stdout))
        for more in ([], ["--val_fraction", "0.5"])
    )
    assert len(whole) == 100
    assert 25 < len(part) < 75


def test_help_imports_the_standard_inspect_and_nothing_heavy(tmp_path):
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = ["inspect_data.py", "--help"], {str(TOOL.parent)!r}
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
except SystemExit:
    import inspect
    print("signature" in vars(inspect), "heavy:", sorted({{"torch", "tokenizers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("True heavy: []\n"), done.stderr


def test_a_closed_pipe_is_not_an_error(chat):
    """`| head -1`, with more output than fits into a pipe."""
    command = f"{sys.executable} {TOOL} chat --documents {'0-2 ' * 2000}| head -1"
    done = subprocess.run(command, shell=True, cwd=chat, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("pair       chat\n", "")


def test_a_terminal_without_unicode_is_not_an_error(chat):
    command = [sys.executable, str(TOOL), "chat", "--documents", "0"]
    done = subprocess.run(command, cwd=chat, capture_output=True, timeout=60, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"User: \\u4f60\\u597d" in done.stdout
