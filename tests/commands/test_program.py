"""The program `rwkv-peft`: its subcommands, and the scripts of a clone that start the same subcommands."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rwkv_peft.__main__ import COMMANDS, help_text, run
from rwkv_peft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "pytorch_lightning", "deepspeed", "tokenizers", "rwkv_peft.training")

SCRIPTS = {
    "train.py": "train",
    "tools/json2binidx.py": "convert",
    "tools/inspect_data.py": "inspect",
    "tools/inspect.py": "inspect",
    "tools/merge.py": "merge",
    "demo/chat.py": "chat",
}
"""Scripts of a clone: the subcommand that each of them starts."""


def python(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "RWKV-PEFT"), **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_help_lists_every_command_on_one_line_without_heavy_imports(tmp_path):
    code = f"""
import sys
sys.argv = ["rwkv-peft", "--help"]
from rwkv_peft.__main__ import main
try:
    main()
except SystemExit as end:
    print(end.code, sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.endswith("\n0 []\n"), done.stderr
    for name, (_, line) in COMMANDS.items():
        assert f"\n  {name:<9}{line}\n" in done.stdout
        assert len(line) < 90


def test_the_program_without_words_prints_its_help(capsys):
    assert run([]) == 0
    assert capsys.readouterr().out == help_text() + "\n"
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rwkv-peft 0.")


def test_an_unknown_command_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown command; found 'mrge', expected train, .*\. Did you mean merge\?$"):
        run(["mrge"])
    done = python("-m", "rwkv_peft", "xyz", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: rwkv-peft: unknown command; found 'xyz'")
    assert done.stderr.endswith("See rwkv-peft --help.\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_in_its_own_name_without_torch(name, tmp_path):
    code = f"""
import sys
sys.argv = ["rwkv-peft", {name!r}, "--help"]
from rwkv_peft.__main__ import main
try:
    main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.startswith(f"usage: rwkv-peft {name} "), done.stderr
    assert done.stdout.endswith("\n0 False\n")


@pytest.mark.parametrize(("script", "name"), SCRIPTS.items())
def test_a_script_of_a_clone_is_the_same_program(script, name, tmp_path):
    """Started from another folder and without PYTHONPATH: the script itself finds the package."""
    done = python(str(ROOT / script), "--help", cwd=tmp_path, PYTHONPATH="")
    assert done.stdout.startswith(f"usage: python {ROOT / script} "), done.stderr
    module = import_module(f"rwkv_peft.commands.{COMMANDS[name][0]}")
    assert module.main.__module__.startswith("rwkv_peft.")
    assert f"from {module.__name__} import main" in (ROOT / script).read_text()


PROGRAMS = sorted(path for folder in ("", "tools", "demo") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_program_changes_sys_path_in_one_line_only(path):
    changes = [line for line in path.read_text().splitlines() if "sys.path" in line]
    assert len(changes) <= 1


def test_nothing_in_the_package_changes_sys_path():
    for path in (ROOT / "RWKV-PEFT").rglob("*.py"):
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not any(ast.unparse(node) == "sys.path" for node in names), path


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import inspect; print(inspect.signature.__module__, inspect.__file__)"],
        ["user.py"],
    ],
)
def test_tools_inspect_does_not_hide_the_standard_module(words, tmp_path):
    """A user's own script in tools/, and `python -c` there, have that folder first on their path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "inspect.py").write_bytes((ROOT / "tools" / "inspect.py").read_bytes())
    (tools / "user.py").write_text(
        "import dataclasses, inspect, sys\n"
        "assert sys.modules['inspect'] is inspect\n"
        "print(inspect.signature.__module__, inspect.__file__)\n"
    )
    done = python(*words, cwd=tools, PYTHONPATH="")
    assert done.stderr == ""
    name, file = done.stdout.split()
    assert name == "inspect"
    assert Path(file) != tools / "inspect.py"
