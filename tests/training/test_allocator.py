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
from rwkv_peft.training.allocator import keep_freed_pages

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

told = keep_freed_pages() if KEEP else None
before = resident()
tensors = [torch.zeros(2**21) + 1 for _ in range(24)]  # 8 MB each
del tensors
print(told, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_kept():
    (told, kept), (_, returned) = probe("True"), probe("False")
    if told == "False":
        pytest.skip("no glibc here")
    assert int(kept) > 100
    assert int(returned) < 100


def probe(keep):
    # Stated, the threshold stays: glibc would raise it when anything large was freed before.
    package = str(Path(__file__).resolve().parents[2] / "RWKV-PEFT")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17), "PYTHONPATH": package}
    command = [sys.executable, "-c", PROBE.replace("KEEP", keep)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
