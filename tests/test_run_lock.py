"""Two runs in one folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.errors import ConfigError
from rwkv_peft.run_lock import LOCK, check_unlocked, only_run_in

HOLDER = """
import sys, time
from pathlib import Path
from rwkv_peft.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for attempt in (lambda: check_unlocked(tmp_path), lambda: only_run_in(tmp_path).__enter__()):
            with pytest.raises(ConfigError, match=rf"--proj_dir: .* is in use by a run, process {holder.pid} on "):
                attempt()
        holder.kill()
    check_unlocked(tmp_path)
    with only_run_in(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    with only_run_in(tmp_path):
        pass


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with only_run_in(tmp_path):
        assert "cannot be locked" in capsys.readouterr().err


def test_looking_makes_nothing(tmp_path):
    check_unlocked(tmp_path / "none")
    assert not (tmp_path / "none").exists()
