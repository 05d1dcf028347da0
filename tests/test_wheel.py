"""The wheel: every package folder and C++ source is in it, and the installed program does the main job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers import with_shape, write_base

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ["RWKV-PEFT", "cuda", "pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources without downloading anything."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg*")
            )
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *flags, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def run(*words: object, cwd: Path | None = None, **variables: str) -> str:
    """Run a program, which must succeed; return its stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_package_folder_and_source_file_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "RWKV-PEFT"
    folders = {path.parent for path in (package / "rwkv_peft").rglob("*.py")}
    assert len(folders) > 20
    for folder in folders:
        assert f"{folder.relative_to(package).as_posix()}/__init__.py" in packed
    modules = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    sources = [f"rwkv_peft/_csrc/{path.relative_to(ROOT / 'cuda').as_posix()}" for path in (ROOT / "cuda").rglob("*.*")]
    assert set(modules + sources) <= packed
    assert not [name for name in packed if name.startswith(("tests/", "tools/", "demo/"))]


@pytest.mark.slow
def test_the_installed_program_does_the_main_job(wheel, tmp_path):
    """Convert, train and merge in a new virtual environment, in a folder far from the sources."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    binary = tmp_path / "venv" / "bin"
    site = Path(run(binary / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--python", binary / "python", "install", "--no-deps", "--no-index", wheel)
    # The dependencies are those of this environment; the venv's own folder comes first.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    work = tmp_path / "work"
    work.mkdir()
    place = run(binary / "python", "-c", "import rwkv_peft; print(rwkv_peft.__file__)", cwd=work)
    assert Path(place.strip()) == site / "rwkv_peft" / "__init__.py"

    program = binary / "rwkv-peft"
    write_base(work / "base.pth", with_shape(vocab_size=257))
    lines = [json.dumps({"text": f"User: {n}?\n\nAssistant: It is {n * n}."}) for n in range(32)]
    (work / "chat.jsonl").write_text("\n".join(lines))
    run(program, "convert", "--input", "chat.jsonl", "--output_prefix", "chat", "--tokenizer", "bytes", cwd=work)
    flags = "--data_file chat --dataload pad --ctx_len 40 --epoch_steps 3 --lr_init 1e-3 --peft bone --proj_dir out"
    bone = ["--bone_config", '{"r":16}']
    run(program, "train", "--load_model", "base.pth", *flags.split(), *bone, cwd=work)
    merge = "--base_model base.pth --adapter out/rwkv-0.safetensors --output merged.pth".split()
    assert "100.0 % of the update is kept" in run(program, "merge", *merge, cwd=work)
    assert (work / "merged.pth").exists()
    assert run(binary / "python", "-m", "rwkv_peft", "--version", cwd=work).startswith("rwkv-peft ")
