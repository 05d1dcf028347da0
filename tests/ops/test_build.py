"""Building on first use: the cache, its lock, and the messages if a build fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from rwkv_peft.ops import build

TRIVIAL = 'extern "C" int answer() { return 42; }\n'

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Provide sources of a library "trivial" that compiles in a second, and an empty extensions folder."""
    folder = tmp_path / "cuda"
    (folder / "trivial").mkdir(parents=True)
    (folder / "trivial" / "trivial.cpp").write_text(TRIVIAL)
    monkeypatch.setattr(build, "source_dir", lambda: folder)
    monkeypatch.setitem(build.LIBRARIES, "trivial", build.Library("trivial", ("trivial.cpp",)))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    build.load_library.cache_clear()
    yield folder / "trivial"
    build.load_library.cache_clear()


def load_again() -> str | None:
    """Load as in a new process. Within a process, PyTorch numbers repeated builds of the same name."""
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()
    build.load_library.cache_clear()
    return build.load_library("trivial")


def built_folders() -> list[Path]:
    return sorted(Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir())


@needs_compiler
def test_builds_once_and_again_when_a_source_or_a_flag_changes(sources, monkeypatch):
    assert load_again() is None
    (first,) = built_folders()
    built_at = (first / f"{first.name}.so").stat().st_mtime_ns
    assert load_again() is None
    assert (first / f"{first.name}.so").stat().st_mtime_ns == built_at

    (sources / "header.h").write_text("// a header that is not listed anywhere\n")
    assert load_again() is None
    assert len(built_folders()) == 2
    monkeypatch.setattr(build, "CXX_FLAGS", ("-O0",))
    assert load_again() is None
    assert len(built_folders()) == 3


@needs_compiler
def test_works_without_ninja_on_path(sources, monkeypatch, tmp_path):
    """For example if the interpreter is called by its path and its environment is not activated."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "g++", "as", "ld", "sh"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    assert shutil.which("ninja") is None
    assert load_again() is None
    assert os.environ["PATH"] == str(tools)


@needs_compiler
def test_a_lock_left_by_a_killed_build_does_not_hang(sources):
    assert load_again() is None
    (folder,) = built_folders()
    (folder / "finished").unlink()
    (folder / "lock").touch()  # PyTorch's own lock, which would be waited for forever
    assert load_again() is None
    assert (folder / "finished").exists()
    assert not (folder / "lock").exists()


LOAD_TRIVIAL = """
import sys
from pathlib import Path
from rwkv_peft.ops import build

build.source_dir = lambda: Path(sys.argv[1])
build.LIBRARIES["trivial"] = build.Library("trivial", ("trivial.cpp",))
sys.exit(build.load_library("trivial"))
"""


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_together_build_once(sources):
    env = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[2])}
    command = [sys.executable, "-c", LOAD_TRIVIAL, str(sources.parent)]
    processes = [subprocess.Popen(command, env=env) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    (folder,) = built_folders()
    links = [line for line in (folder / ".ninja_log").read_text().splitlines() if f"{folder.name}.so" in line]
    assert len(links) == 1


@needs_compiler
def test_the_message_has_the_compilers_first_error(sources):
    (sources / "trivial.cpp").write_text("int broken() { return undeclared; }\n")
    reason = load_again()
    assert "trivial.cpp:1:" in reason
    assert "undeclared" in reason
    assert "\n" not in reason


@needs_compiler
def test_a_finished_build_needs_no_compiler(sources, monkeypatch):
    """For example in a container whose compiler was removed after the build."""
    assert load_again() is None
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert load_again() is None


def test_the_message_names_the_missing_compiler(sources, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_again().startswith("no C++ compiler: 'no-such-compiler' is not on PATH")


@pytest.mark.slow
@needs_compiler
def test_the_cuda_binding_compiles_without_cuda():
    """Checks the syntax and types of the one C++ file that is otherwise compiled only with CUDA."""
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    source = build.source_dir() / "wkv6" / "gpu" / "op.cpp"
    subprocess.run(["c++", "-std=c++20", "-fsyntax-only", *includes, source], check=True)
