"""The CPU allocator keeps freed memory, or returns it to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")

PROBE = """
from pathlib import Path
from rwkv_peft.memory.allocator import give_back_freed_pages, keep_freed_pages

def allocate(size):
    return b"1" * size  # like torch, Python takes large blocks from malloc

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024

applied = CALL
before = resident()
blocks = [allocate(2**23) for _ in range(24)]
last = blocks.pop()  # stays allocated, above the others
del blocks
print(applied, resident() - before)
"""

FIXED_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""With this variable set, glibc does not change its threshold."""


def test_freed_pages_are_kept():
    assert probe("keep_freed_pages()", **FIXED_THRESHOLD) > 100
    assert probe("None", **FIXED_THRESHOLD) < 100


def test_freed_pages_are_returned():
    """In a case where glibc alone would keep them: it raises its threshold when something large is freed."""
    earlier = "[allocate(2**24) for _ in range(2)].clear() or "
    assert probe(earlier + "give_back_freed_pages()") < 30
    assert probe(earlier + "None") > 100


def probe(call: str, **env: str) -> int:
    """Return the MB that a process keeps of 184 MB freed after `call`."""
    package = str(Path(__file__).resolve().parents[2] / "RWKV-PEFT")
    env = os.environ | env | {"PYTHONPATH": package}
    command = [sys.executable, "-c", PROBE.replace("CALL", call)]
    applied, kept = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
    if applied == "False":
        pytest.skip("no glibc here")
    return int(kept)
