"""The plot of the schedules in docs/training.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_writes_a_picture(tmp_path):
    command = [sys.executable, "tools/plot_schedules.py"]
    subprocess.run([*command, str(tmp_path / "out.png")], cwd=ROOT, check=True)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: command line: no picture to write" in result.stderr
