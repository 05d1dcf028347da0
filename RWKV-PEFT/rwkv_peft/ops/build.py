"""Compiles and loads the C++ and CUDA operators on first use.

The sources are in `<package>/_csrc` (installed package) or `<clone>/cuda` (clone). Libraries are built in PyTorch's
extensions folder (TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions). A library's folder is named by a hash of its
sources, compiler, flags and PyTorch version, so a change of any of them triggers a new build.

    python -m rwkv_peft.ops.build    build the CPU operators, or find an existing build
"""

from __future__ import annotations

import contextlib
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

from rwkv_peft.console import say
from rwkv_peft.files import file_lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """One shared library. Its sources, and the headers they include, are in one folder of cuda/."""

    folder: str
    sources: tuple[str, ...]
    needs_cuda: bool = False


LIBRARIES = {
    "wkv6": Library("wkv6", ("wkv6_op.cpp", "cpu/device.cpp", "cpu/avx512.cpp", "cpu/avx2.cpp", "cpu/plain.cpp")),
    "bone": Library("bone", ("bone_op.cpp", "bone_plain.cpp", "bone_avx2.cpp", "bone_avx512.cpp")),
    "mix": Library("mix", ("mix_op.cpp", "mix_avx512.cpp", "mix_avx2.cpp", "mix_plain.cpp")),
    "wkv6_cuda": Library("wkv6", ("gpu/op.cpp", "gpu/device.cu"), needs_cuda=True),
}

# No -march: each source names the instruction set it is compiled for, and the best one is chosen at run time. Machines
# with different processors can therefore share a build.
# No -ffast-math: it lets the compiler assume that inf and NaN do not occur. The two flags below only disable errno and
# floating-point traps.
# The linker does not get -fopenmp: the symbols then resolve to the OpenMP runtime that PyTorch has loaded, and both
# share one thread pool.
CXX_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
NVCC_FLAGS = ("-O3", "-std=c++20")


def source_dir() -> Path:
    """Return the folder with the C++ and CUDA sources.

    Raises:
        FileNotFoundError: the sources are neither in the installed package nor in a clone.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_csrc", package.parents[1] / "cuda")
    for folder in candidates:
        if (folder / "wkv6").is_dir():
            return folder
    raise FileNotFoundError(f"no C++ sources found in {' or '.join(map(str, candidates))}")


@functools.cache
def load_library(name: str) -> str | None:
    """Load one of `LIBRARIES` into this process; build it first if there is no matching build.

    Returns:
        None if the library is loaded. Otherwise the reason in one line, such as a missing compiler or the compiler's
        first errors.
    """
    library = LIBRARIES[name]
    if library.needs_cuda and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
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
        return "no CUDA compiler: nvcc is not on PATH and not in CUDA_HOME/bin"
    return missing_compiler()


def missing_compiler() -> str | None:
    """Return an error message if there is no C++ compiler, otherwise None."""
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler: {_compiler()!r} is not on PATH (install g++, or set CXX to your compiler)"
    return None


def _build(library: Library, folder: Path) -> None:
    """Build the library in `folder`, unless another process has finished it in the meantime."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder), ninja_on_path():
        if _finished(folder):
            return
        logger.warning("note: compiling the operator %s (once, about 30 seconds)", folder.name)
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
    """Whether the build is complete. The marker is written last, so a build that was killed does not have it."""
    return (folder / "finished").exists()


def _build_folder(name: str, library: Library) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / f"rwkv_peft_{name}_{_fingerprint(library)}"


def _fingerprint(library: Library) -> str:
    """Return a hash of everything that affects the library, so that an outdated build is never loaded."""
    digest = hashlib.sha256()
    root = source_dir()
    sources = [*root.glob("*.h"), *(root / library.folder).rglob("*.*")]  # includes the headers
    for path in sorted(sources):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    facts = [torch.__version__, _compiler(), *CXX_FLAGS, platform.machine()]
    if library.needs_cuda:
        capability = torch.cuda.get_device_capability()
        facts += [*NVCC_FLAGS, str(capability), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "c++")  # the same choice as torch.utils.cpp_extension


@contextlib.contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Let one process build at a time, and ignore the lock of a killed process.

    PyTorch's own lock is a file that its owner removes. If the owner is killed, the file stays and every later process
    waits forever. The operating system releases an flock when its owner ends, so while we hold ours, an existing `lock`
    file must be left over from a killed process.
    """
    with file_lock(folder / "builder", wait=True):
        (folder / "lock").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def ninja_on_path() -> Iterator[None]:
    """Add the interpreter's folder to PATH: pip installs ninja there, and the environment may not be activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def first_errors(output: str, limit: int = 2) -> str:
    """Return the compiler's first errors from ninja's output, or the last line if there are none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(fatal )?error\b", line, re.IGNORECASE)]
    compiler_errors = [line for line in errors if re.search(r":\d+.*error", line)]
    return "; ".join((compiler_errors or errors or lines[-1:])[:limit])


def find_nvcc() -> str | None:
    """Return the path of nvcc from CUDA_HOME, otherwise from PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def main() -> int:
    """Load every CPU library and print the result. Return 1 if one of them failed."""
    reasons = {name: load_library(name) for name, library in LIBRARIES.items() if not library.needs_cuda}
    for name, reason in reasons.items():
        say(f"{name}: {reason or 'built and loaded'}")
    return int(any(reasons.values()))


if __name__ == "__main__":
    sys.exit(main())
