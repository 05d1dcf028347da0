"""Describes the software and hardware of a run: versions, commit, processor, memory, GPU."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rwkv_peft

PACKAGES = ("torch", "pytorch-lightning", "deepspeed", "numpy", "bitsandbytes", "flash-linear-attention", "triton")
GIB = 2**30


def software() -> dict[str, str]:
    """Return names and versions; packages that are not installed are omitted."""
    rows = {"rwkv-peft": f"{rwkv_peft.__version__}{_commit()}", "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            rows[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        rows["CUDA"] = torch.version.cuda
    return rows | {"system": platform.platform()}


def hardware() -> dict[str, str]:
    """Return the processor, memory and GPUs of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {"processor": f"{_processor()}, {os.cpu_count()} cores, {usable} usable"}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        rows["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB"
    return rows


def peak_memory() -> dict[str, str]:
    """Return the peak memory of the main process so far."""
    rows = {}
    if os.name == "posix":
        import resource  # not on Windows

        unit = 1 if platform.system() == "Darwin" else 1024
        rows["peak memory"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        rows["peak GPU memory"] = f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB"
    return rows


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the clone that the package runs from; "" if there is no clone or no git."""
    package = Path(rwkv_peft.__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() / "RWKV-PEFT" / "rwkv_peft" != package:
            return ""  # the package is installed inside another repository
        changed = ", modified" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f", commit {git('rev-parse', '--short=12', 'HEAD')}{changed}"
    except (OSError, subprocess.SubprocessError):
        return ""
