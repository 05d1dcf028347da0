"""The starter model and data: what `python train.py --peft bone` uses without a model and data."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.adapted_model import load_plain
from rwkv_peft.commands import starter
from rwkv_peft.commands.train import main
from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.errors import UserError
from rwkv_peft.run_config import config_from_settings, settings_from_argv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(tmp_path, monkeypatch) -> list[Path]:
    """Work in an empty folder, and replace the slow training of the model by empty files."""
    folders = []

    def make(folder: Path) -> None:
        folders.append(folder)
        folder.mkdir()
        (folder / "base.pth").touch()
        (folder / "questions.idx").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "make_starter", make)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return folders


def test_the_starter_is_made_once_and_the_users_flags_win(made, capsys):
    settings = starter.with_starter(settings_from_argv(["--peft", "bone", "--micro_bsz", "2"]))
    assert made == [Path("starter")]
    assert (settings["micro_bsz"], settings["dataload"], settings["peft"]) == (2, "pad", "bone")
    assert capsys.readouterr().err.startswith("note: no --load_model and no --data_file: using the small starter model")
    starter.with_starter({})
    assert len(made) == 1


def test_a_dry_run_makes_nothing(made):
    settings = starter.with_starter(settings_from_argv(["--peft", "bone", "--dry_run"]))
    assert made == []
    assert config_from_settings(settings).model == ModelConfig(n_layer=4, n_embd=128, vocab_size=257)


def test_a_mistake_is_reported_before_anything_is_made(made):
    with pytest.raises(UserError, match="--resume: no such file or folder; found auot"):
        main(["--peft", "bone", "--resume", "auot"])
    assert made == []


def test_launched_processes_do_not_all_make_it(made, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"starter/base\.pth: missing; a single process must make the starter model"):
        starter.with_starter({})
    assert made == []


def test_questions_are_correct_different_and_reproducible():
    records = list(starter.questions(300))
    assert records == list(starter.questions(300))
    assert len({record["instruction"] for record in records}) == 300
    for record in records:
        sum_, _ = record["output"].split(". ")
        left, right = sum_.split(" = ")
        assert eval(left) == int(right)
        assert f" {right} " in record["output"].split(". ")[1]


def test_the_package_imports_no_package_of_the_demo():
    demo = {line.split("==")[0].replace("-", "_") for line in (ROOT / "requirements-demo.txt").read_text().splitlines()}
    assert {"reasoning_gym", "matplotlib"} <= demo
    for path in (ROOT / "RWKV-PEFT").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {*demo, "demo"}, path


@pytest.mark.slow
def test_the_bare_command_makes_the_starter_and_trains(tmp_path):
    """The whole command, with fewer steps."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "RWKV-PEFT")!r})
from rwkv_peft.commands import starter, train
starter.PRETRAIN = {{**starter.PRETRAIN, "epoch_steps": 4, "warmup_steps": 0}}
train.main(["--peft", "bone", "--bone_config", '{{"r":64}}', "--epoch_steps", "3"])
assert not {{"demo", "reasoning_gym"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "starter"]
    assert load_plain(tmp_path / "starter/base.pth").config.n_embd == 128
    questions, validation = (BinidxReader(tmp_path / f"starter/questions{half}") for half in ("", "_val"))
    assert len(questions) + len(validation) == 3000
    assert (tmp_path / "out/rwkv-0.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert "val_loss" in rows[-1]
