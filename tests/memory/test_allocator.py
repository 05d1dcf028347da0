"""Freed memory stays with a training process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import torch
from pathlib import Path
from rwkv_peft.memory.allocator import give_back_freed_pages, keep_freed_pages

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

told = CALL
before = resident()
tensors = [torch.zeros(2**21) + 1 for _ in range(24)]  # 8 MB each
last = tensors.pop()  # stays, above the others
del tensors
print(told, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_kept():
    (told, kept), (_, returned) = probe("keep_freed_pages()", **STATED), probe("None", **STATED)
    if told == "False":
        pytest.skip("no glibc here")
    assert int(kept) > 100
    assert int(returned) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_given_back():
    """Where glibc by itself would keep them: it raises its threshold when anything large is freed."""
    earlier = "[torch.zeros(2**22) for _ in range(2)].clear() or "
    (told, returned), (_, kept) = probe(earlier + "give_back_freed_pages()"), probe(earlier + "None")
    if told == "False":
        pytest.skip("no glibc here")
    assert int(returned) < 30
    assert int(kept) > 100


STATED = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""A threshold that is stated stays."""


def probe(call, **env):
    package = str(Path(__file__).resolve().parents[2] / "RWKV-PEFT")
    env = os.environ | env | {"PYTHONPATH": package}
    command = [sys.executable, "-c", PROBE.replace("CALL", call)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
