"""Compile and load the C++ and CUDA operators, on first use.

The sources lie in `<package>/_csrc` when installed and in `<clone>/cuda` in a clone. What is built goes to PyTorch's
extensions folder (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions), named by a hash of all that shapes it.

    python -m rwkv_peft.ops.build    build or find the operators of the CPU
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """One shared library. Its sources lie in one folder, beside the headers they include."""

    folder: str
    sources: tuple[str, ...]
    needs_cuda: bool = False


LIBRARIES = {
    "wkv6": Library(
        "wkv6", ("wkv6_op.cpp", "wkv6_cpu.cpp", "wkv6_cpu_avx512.cpp", "wkv6_cpu_avx2.cpp", "wkv6_cpu_plain.cpp")
    ),
    "bone": Library("bone", ("bone_op.cpp", "bone_plain.cpp", "bone_avx2.cpp", "bone_avx512.cpp")),
    "mix": Library("mix", ("mix_op.cpp", "mix_avx512.cpp", "mix_avx2.cpp", "mix_plain.cpp")),
    "wkv6_cuda": Library("wkv6", ("wkv6_cuda_op.cpp", "wkv6_cuda.cu"), needs_cuda=True),
}

# No -march: the sources name the instruction sets they are compiled for, and the one to run is chosen when it runs, so
# that machines of several kinds can share a build.
# Not -ffast-math: it lets the compiler assume that no inf or NaN occurs. These two only drop errno and FP traps.
# -fopenmp is missing from the link on purpose: the symbols then resolve to the OpenMP that PyTorch has loaded, and
# both share one pool of threads.
CXX_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
NVCC_FLAGS = ("-O3", "-std=c++20")


def source_dir() -> Path:
    """The folder of C++ and CUDA sources.

    Raises:
        FileNotFoundError: neither an installed package nor a clone.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_csrc", package.parents[1] / "cuda")
    for folder in candidates:
        if (folder / "wkv6").is_dir():
            return folder
    raise FileNotFoundError(f"no C++ sources in {' or '.join(map(str, candidates))}")


@functools.cache
def load_library(name: str) -> str | None:
    """Load one of `LIBRARIES` into this process, building it if no finished build fits.

    Returns:
        None when it is loaded, else the reason in one line: no compiler, no nvcc, the compiler's first errors.
    """
    library = LIBRARIES[name]
    if library.needs_cuda and not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    try:
        folder = _build_folder(name, library)
        if not _finished(folder):
            if reason := _missing_tool(library):
                return reason
            _build(library, folder)
        torch.ops.load_library(folder / f"{folder.name}.so")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.debug("building %s failed", name, exc_info=True)
        return first_errors(str(error))
    return None


def _missing_tool(library: Library) -> str | None:
    if library.needs_cuda and find_nvcc() is None:
        return "no CUDA compiler: nvcc is neither on PATH nor under CUDA_HOME"
    return missing_compiler()


def missing_compiler() -> str | None:
    """Why there is no C++ compiler; None where there is one."""
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler: {_compiler()!r} is not on PATH (Debian: apt install g++; or set CXX)"
    return None


def _build(library: Library, folder: Path) -> None:
    """Build in `folder` unless another process just did."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder), ninja_on_path():
        if _finished(folder):
            return
        logger.warning("note: building the operator %s (some 10 s, once)", folder.name)
        cpp_extension.load(
            folder.name,
            [str(source_dir() / library.folder / source) for source in library.sources],
            extra_cflags=list(CXX_FLAGS),
            extra_cuda_cflags=list(NVCC_FLAGS),
            build_directory=str(folder),
            is_python_module=False,
        )
        (folder / "finished").touch()


def _finished(folder: Path) -> bool:
    """Whether the library is whole: the marker is written last, a killed linker leaves half a file without it."""
    return (folder / "finished").exists()


def _build_folder(name: str, library: Library) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / f"rwkv_peft_{name}_{_fingerprint(library)}"


def _fingerprint(library: Library) -> str:
    """A hash of everything that shapes the library, so that a stale build is never taken for a fresh one."""
    digest = hashlib.sha256()
    sources = [*source_dir().glob("*.h"), *(source_dir() / library.folder).iterdir()]  # headers are not listed anywhere
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    facts = [torch.__version__, _compiler(), *CXX_FLAGS, platform.machine()]
    if library.needs_cuda:
        capability = torch.cuda.get_device_capability()
        facts += [*NVCC_FLAGS, str(capability), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it


@contextlib.contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Let one process build at a time, and get past a lock whose owner was killed.

    PyTorch's own lock is a file that its owner removes: left by a killed process, it makes every later one wait for
    ever. The kernel drops an flock with its owner, so while we hold ours, a `lock` file can only be such a leftover.
    """
    with open(folder / "builder", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def ninja_on_path() -> Iterator[None]:
    """pip puts ninja beside the interpreter, which is not on PATH unless the environment was activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def first_errors(output: str, limit: int = 2) -> str:
    """The compiler's first errors out of ninja's output, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(fatal )?error\b", line, re.IGNORECASE)]
    compiler_errors = [line for line in errors if re.search(r":\d+.*error", line)]
    return "; ".join((compiler_errors or errors or lines[-1:])[:limit])


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def main() -> int:
    reasons = {name: load_library(name) for name, library in LIBRARIES.items() if not library.needs_cuda}
    for name, reason in reasons.items():
        print(f"{name}: {reason or 'built and loaded'}")
    return int(any(reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
