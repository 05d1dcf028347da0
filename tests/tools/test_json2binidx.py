"""`rwkv-peft convert`, started by tools/json2binidx.py as a user does."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rwkv_peft.data.binidx.reader import BinidxReader

TOOL = Path(__file__).parents[2] / "tools" / "json2binidx.py"


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_converts_with_the_world_tokenizer_by_default(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": "hello 你好\\n\\n"}\n', encoding="utf-8")
    done = run_tool("--input", "chat.jsonl", "--output_prefix", "data/chat", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    assert "documents  1" in done.stdout
    assert np.fromfile(tmp_path / "data" / "chat.bin", "<u2").tolist() == [34550, 33, 10464, 11685, 261, 0]


def test_bad_input_is_one_line_and_a_failure(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    arguments = ("--input", "chat.jsonl", "--output_prefix", "chat", "--tokenizer", "bytes")
    done = run_tool(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: chat.jsonl:2: 'text' is not a string; found a number.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]
    assert "Traceback" in run_tool(*arguments, "--debug", cwd=tmp_path).stderr


def test_help_needs_no_heavy_import(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["json2binidx.py", "--help"]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
except SystemExit:
    print("heavy:", sorted({{"torch", "tokenizers", "pyrwkv_tokenizer", "tqdm", "numpy", "jinja2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "--output_prefix PREFIX" in done.stdout
    assert "heavy: []" in done.stdout


def test_a_file_named_like_a_standard_module_is_not_imported(tmp_path):
    """A file such as tools/inspect.py must not replace a module of the standard library."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "json2binidx.py").write_bytes(TOOL.read_bytes())
    (tools / "inspect.py").write_text("raise SystemExit('the wrong inspect')")
    (tmp_path / "RWKV-PEFT").symlink_to(TOOL.parents[1] / "RWKV-PEFT")
    command = [sys.executable, str(tools / "json2binidx.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_standard_input(tmp_path):
    command = [sys.executable, str(TOOL), "--input", "-", "--output_prefix", "out", "--tokenizer", "bytes"]
    done = subprocess.run(command, cwd=tmp_path, input=b'{"text": "a"}\n{', capture_output=True, timeout=60)
    assert done.stderr.decode().startswith("error: <stdin>:2: malformed JSON (")
    done = subprocess.run(command, cwd=tmp_path, input=b'{"text": "a"}\n', capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert np.fromfile(tmp_path / "out.bin", "<u2").tolist() == [98, 0]


def test_all_flags_together(tmp_path):
    records = [{"a": f"q{i}", "b": "r" * (i % 9 + 1), "c": i} for i in range(200)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps([*records, {"a": "x"}]))
    (tmp_path / "t.j2").write_text(
        "{{ record.c }} {{ messages[0].content }}{{ answer_begin }}{{ messages[1].content }}{{ answer_end }}\n"
    )
    done = run_tool(
        *("--input", "in", "--output_prefix", "out", "--tokenizer", "bytes"),
        *("--fields", "a", "b", "--template", "t.j2"),
        *("--val_fraction", 0.2, "--workers", 2, "--on_error", "skip", "--ctx_len", 8),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    masks = [np.fromfile(tmp_path / f"out{half}.mask.bin", "u1").sum() for half in ("", "_val")]
    assert sum(masks) == sum(len(record["b"]) + 1 for record in records)  # each answer and its eod
    lengths = [len(f"{r['c']} {r['a']}{r['b']}") + 1 for r in records]
    over = sum(length > 8 for length in lengths)
    assert f"too long   {over} documents ({over / 200:.1%}) are longer than ctx_len 8\n" in done.stdout
    assert "rejects    1 (see the .rejects.jsonl)\n" in done.stdout
    assert "out.rejects.jsonl" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "none.j2"), "--template: cannot be read; found [Errno 2]"),
        (("--template", "bad.j2"), "--template bad.j2: has a syntax error; found line 1: "),
        (("--val_fraction", "1"), "--val_fraction: invalid value; found 1.0, expected 0 or more, and below 1."),
        (("--workers", "-1"), "--workers: invalid value; found -1"),
        (("--ctx_len", "0"), "--ctx_len: invalid value; found 0"),
        (("--text_key", "a", "--fields", "b", "c"), "--text_key: cannot be combined with --fields"),
    ],
)
def test_bad_flags_are_named(tmp_path, flags, message):
    (tmp_path / "bad.j2").write_text("{% for %}")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    done = run_tool("--input", "a.jsonl", "--output_prefix", "out", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_is_one_line(tmp_path):
    """A limit on the file size causes the same error in the same call as a full disk."""
    (tmp_path / "a.jsonl").write_text('{"text": "some words and more"}\n' * 100_000)
    (tmp_path / "b.jsonl").write_text('{"text": "old"}\n')
    assert run_tool("--input", "b.jsonl", "--output_prefix", "out", cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--input", "a.jsonl", "--output_prefix", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: out: the disk is full; found File too large. Nothing was written.")
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(happened, seconds=40):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_keeps_the_old_pair_and_leaves_no_process(tmp_path, how, code):
    """The records come through a pipe that stays open, so the run cannot finish."""
    (tmp_path / "a.jsonl").write_text('{"text": "old"}\n')
    flags = ("--output_prefix", "out", "--tokenizer", "bytes")
    assert run_tool("--input", "a.jsonl", *flags, cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", "-", *flags, "--workers", "2"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(8):  # more than the program reads ahead
        process.stdin.write('{"text": "new"}\n' * 2**16)
    process.stdin.flush()
    wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".out.bin.*.tmp")))
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    assert process.wait(timeout=40) == code
    assert "Traceback" not in process.stderr.read()
    process.stdin.close()
    wait_until(lambda: not any(is_running(worker) for worker in workers))
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.items() >= before.items()
    assert how == signal.SIGKILL or after == before
    assert len(BinidxReader(tmp_path / "out")) == 1


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
