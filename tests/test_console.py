"""Who prints, where, and how a progress bar survives it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from rwkv_peft import console

LAUNCHERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "CROSS_RANK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "is_main"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # the first process of another node
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun inside a SLURM job
        ({"LOCAL_RANK": "1"}, False),  # Lightning's own launcher
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
    ],
)
def test_only_the_main_process_prints(monkeypatch, capsys, environment, is_main):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert console.is_main_process() is is_main
    console.say("a result")
    console.note("a fact")
    console.warn("a problem")
    out, err = capsys.readouterr()
    assert out == ("a result\n" if is_main else "")
    assert err == ("note: a fact\nwarning: a problem\n" if is_main else "")


def test_a_progress_bar_is_moved_out_of_the_way(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=10, file=screen, mininterval=0, ncols=40) as bar:
        bar.update(3)
        console.note("a fact")
        bar.update(1)
    lines = [line.split("\r")[-1] for line in screen.getvalue().split("\n")]
    assert "note: a fact" in lines, "on a line of its own"
    assert "4/10" in screen.getvalue().split("note: a fact")[1], "the bar is drawn again below"


def test_printing_imports_no_progress_bar():
    code = "from rwkv_peft import console; import sys; console.say('x'); assert 'tqdm' not in sys.modules"
    package = Path(console.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True).stdout == b"x\n"
