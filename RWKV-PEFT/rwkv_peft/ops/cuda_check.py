"""Compile every .cu for the GPUs we mean to run on, and refuse kernels whose registers spill to local memory.

    python -m rwkv_peft.ops.cuda_check sm_80 sm_90

No GPU is needed, only nvcc. A spill or an array that the compiler cannot keep in registers is invisible in a kernel's
results and ruinous to its speed, so it is looked for here, in what ptxas says of every kernel.
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

from rwkv_peft.ops.build import NVCC_FLAGS, find_nvcc, source_dir

PROCESSES = 2
"""Compilers that run at a time."""

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'")
_FUNCTION = re.compile(r"Function properties for (?P<name>\S+)")
_LOCAL = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one function on one architecture; bytes per thread, shared memory per block."""

    name: str
    """Mangled."""
    arch: str
    stack: int = 0
    """Local-memory stack frame."""
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int | None = None
    """None for a function that kernels call, which has no registers of its own."""
    shared: int = 0
    """Declared in the kernel; what a launch adds is not known to the compiler."""

    @property
    def uses_local_memory(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


class CompileError(Exception):
    """nvcc refused a source; the message is what it said."""


def read_report(text: str) -> list[Kernel]:
    """The kernels, and the functions they call, in the output of `nvcc -Xptxas -v`, in its order.

    Raises:
        ValueError: no kernel in the text, or one whose use of local memory it does not tell: nothing was checked then.
    """
    found: dict[tuple[str, str], Kernel] = {}
    told: set[tuple[str, str]] = set()
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
            told.add(current)
        elif match := _REGISTERS.search(line):
            shared = _SHARED.search(line)
            found[entry] = replace(found[entry], registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    if not found:
        raise ValueError("ptxas reported no kernel")
    if untold := sorted(found.keys() - told):
        raise ValueError(f"ptxas did not say how much local memory {untold[0][0]} uses on {untold[0][1]}")
    return list(found.values())


def complaints(kernels: Iterable[Kernel]) -> list[str]:
    """One line per kernel that uses local memory; empty when none does."""
    return [
        f"{kernel.name} on {kernel.arch} uses local memory: {kernel.stack} bytes of stack frame, "
        f"{kernel.spill_stores} bytes of spill stores, {kernel.spill_loads} bytes of spill loads"
        for kernel in kernels
        if kernel.uses_local_memory
    ]


def table(kernels: Sequence[Kernel]) -> str:
    """Registers and shared bytes: a row per kernel, a column per architecture."""
    entries = [kernel for kernel in kernels if kernel.registers is not None]
    names, archs = (list(dict.fromkeys(getattr(kernel, key) for kernel in entries)) for key in ("name", "arch"))
    cells = {(kernel.name, kernel.arch): f"{kernel.registers} / {kernel.shared}" for kernel in entries}
    width = max(map(len, names), default=0)
    head = f"{'registers / shared bytes':<{width}}" + "".join(f"  {arch:>11}" for arch in archs)
    rows = (f"{name:<{width}}" + "".join(f"  {cells.get((name, arch), '-'):>11}" for arch in archs) for name in names)
    return "\n".join((head, *rows))


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The same with names as in the source, where binutils' c++filt is at hand."""
    tool = shutil.which("c++filt")
    if tool is None or not kernels:
        return list(kernels)
    names = "\n".join(kernel.name for kernel in kernels)
    result = subprocess.run([tool, "--no-params"], input=names, capture_output=True, text=True, check=True)
    clear = [name.replace("rwkv_peft::", "") for name in result.stdout.splitlines()]
    return [replace(kernel, name=name) for kernel, name in zip(kernels, clear, strict=True)]


def compile_sources(archs: Sequence[str]) -> list[Kernel]:
    """Compile every .cu with nvcc for each architecture ("sm_80"), keeping nothing but the report.

    Raises:
        FileNotFoundError: nvcc is missing.
        CompileError: a source does not compile.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is neither under CUDA_HOME nor on PATH")
    jobs = [(nvcc, source, arch) for source in sorted(source_dir().rglob("*.cu")) for arch in archs]
    with ThreadPoolExecutor(PROCESSES) as pool:
        reports = list(pool.map(lambda job: _compile(*job), jobs))
    return demangled([kernel for report in reports for kernel in read_report(report)])


def _compile(nvcc: str, source: Path, arch: str) -> str:
    """What nvcc and ptxas say of one source."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [nvcc, *NVCC_FLAGS, f"-arch={arch}", "-Xptxas", "-v", "-c", str(source), "-o", f"{scratch}/out.o"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    if result.returncode != 0:
        raise CompileError(f"{source} for {arch}:\n{said}")
    return said


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rwkv_peft.ops.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="+", metavar="ARCH", help="e.g. sm_80 sm_90")
    archs = parser.parse_args(argv).archs
    if find_nvcc() is None:
        print("cuda-check skipped: no nvcc")
        return 0
    try:
        kernels = compile_sources(archs)
    except CompileError as error:
        print(f"cuda-check: {error}")
        return 1
    print(table(kernels))
    failures = complaints(kernels)
    for failure in failures:
        print(f"cuda-check: {failure}")
    if not failures:
        print(f"cuda-check: every .cu compiles for {', '.join(archs)}; no kernel uses local memory")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
