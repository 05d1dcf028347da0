"""Compiles every .cu file for the given GPU architectures and fails if a kernel uses local memory.

    python -m rwkv_peft.ops.cuda_check sm_80 sm_90

This needs nvcc but no GPU. Register spills, and arrays that do not fit in registers, do not change a kernel's results
but make it much slower. ptxas reports both for every kernel, and this program checks its report.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_peft.console import say
from rwkv_peft.ops.build import NVCC_FLAGS, find_nvcc, source_dir

PROCESSES = 2
"""Number of compilers that run at the same time."""

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'")
_FUNCTION = re.compile(r"Function properties for (?P<name>\S+)")
_LOCAL = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports about one function on one architecture: bytes per thread, shared memory per block."""

    name: str
    """Mangled name."""
    arch: str
    stack: int = 0
    """Local-memory stack frame."""
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int | None = None
    """None for a device function called by kernels: ptxas reports registers for kernels only."""
    shared: int = 0
    """Statically declared shared memory; dynamic shared memory is set at launch and unknown to the compiler."""

    @property
    def uses_local_memory(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


class CompileError(Exception):
    """nvcc could not compile a source. The message is nvcc's output."""


def read_report(text: str) -> list[Kernel]:
    """Parse the output of `nvcc -Xptxas -v`. Return the kernels, and the functions they call, in its order.

    Raises:
        ValueError: the text has no kernel, or lacks the local memory of one. Passing then would check nothing.
    """
    found: dict[tuple[str, str], Kernel] = {}
    reported: set[tuple[str, str]] = set()
    entry = current = ("", "")
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entry = current = (match["name"], match["arch"])
            found[entry] = Kernel(*entry)
        elif match := _FUNCTION.search(line):
            current = (match["name"], entry[1])  # the kernel, or a function of the same architecture
            found.setdefault(current, Kernel(*current))
        elif match := _LOCAL.search(line):
            stack, stores, loads = (int(match[name]) for name in ("stack", "stores", "loads"))
            found[current] = replace(found[current], stack=stack, spill_stores=stores, spill_loads=loads)
            reported.add(current)
        elif match := _REGISTERS.search(line):
            shared = _SHARED.search(line)
            found[entry] = replace(found[entry], registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    if not found:
        raise ValueError("ptxas reported no kernel")
    if missing := sorted(found.keys() - reported):
        raise ValueError(f"ptxas did not report the local memory of {missing[0][0]} on {missing[0][1]}")
    return list(found.values())


def complaints(kernels: Iterable[Kernel]) -> list[str]:
    """Return one line per kernel that uses local memory."""
    return [
        f"{kernel.name} on {kernel.arch} uses local memory: {kernel.stack} bytes of stack frame, "
        f"{kernel.spill_stores} bytes of spill stores, {kernel.spill_loads} bytes of spill loads"
        for kernel in kernels
        if kernel.uses_local_memory
    ]


def table(kernels: Sequence[Kernel]) -> str:
    """Format registers and bytes of shared memory, with one row per kernel and one column per architecture."""
    entries = [kernel for kernel in kernels if kernel.registers is not None]
    names, archs = (list(dict.fromkeys(getattr(kernel, key) for kernel in entries)) for key in ("name", "arch"))
    cells = {(kernel.name, kernel.arch): f"{kernel.registers} / {kernel.shared}" for kernel in entries}
    width = max(map(len, names), default=0)
    head = f"{'registers / shared bytes':<{width}}" + "".join(f"  {arch:>11}" for arch in archs)
    rows = (f"{name:<{width}}" + "".join(f"  {cells.get((name, arch), '-'):>11}" for arch in archs) for name in names)
    return "\n".join((head, *rows))


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return the kernels with their names as in the source, if c++filt (binutils) is installed."""
    tool = shutil.which("c++filt")
    if tool is None or not kernels:
        return list(kernels)
    names = "\n".join(kernel.name for kernel in kernels)
    result = subprocess.run([tool, "--no-params"], input=names, capture_output=True, text=True, check=True)
    clear = [name.replace("rwkv_peft::", "") for name in result.stdout.splitlines()]
    return [replace(kernel, name=name) for kernel, name in zip(kernels, clear, strict=True)]


def compile_sources(archs: Sequence[str]) -> list[Kernel]:
    """Compile every .cu with nvcc for each architecture (such as "sm_80") and return the kernels of the reports.

    Raises:
        FileNotFoundError: nvcc is missing.
        CompileError: a source does not compile.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not in CUDA_HOME/bin and not on PATH")
    jobs = [(nvcc, source, arch) for source in sorted(source_dir().rglob("*.cu")) for arch in archs]
    with ThreadPoolExecutor(PROCESSES) as pool:
        reports = list(pool.map(lambda job: _compile(*job), jobs))
    return demangled([kernel for report in reports for kernel in read_report(report)])


def _compile(nvcc: str, source: Path, arch: str) -> str:
    """Compile one source and return the output of nvcc and ptxas."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [nvcc, *NVCC_FLAGS, f"-arch={arch}", "-Xptxas", "-v", "-c", str(source), "-o", f"{scratch}/out.o"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        raise CompileError(f"{source} for {arch}:\n{output}")
    return output


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkv_peft.ops.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="+", metavar="ARCH", help="e.g. sm_80 sm_90")
    archs = parser.parse_args(argv).archs
    if find_nvcc() is None:
        say("cuda-check: skipped, because nvcc was not found")
        return 0
    try:
        kernels = compile_sources(archs)
    except CompileError as error:
        say(f"cuda-check: {error}")
        return 1
    say(table(kernels))
    failures = complaints(kernels)
    for failure in failures:
        say(f"cuda-check: {failure}")
    if not failures:
        say(f"cuda-check: every .cu compiles for {', '.join(archs)}; no kernel uses local memory")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
