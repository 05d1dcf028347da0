"""Files written by an earlier version load with the same meaning, and files of a newer version are refused.

v0.1.0/README.md describes the files. They are never written again, because only the code of that time can do so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_peft.adapted_model import load_plain, load_with_adapter
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.export.merge import merge, merge_state
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.checkpoint import file as checkpoint_file
from rwkv_peft.training.checkpoint.file import read_checkpoint, write_checkpoint
from tests.helpers import relative_error
from tests.training.small_runs import metrics, train_flags

FILES = Path(__file__).parent / "v0.1.0"
BASE = FILES / "base.pth"
RUNS = ["bone", "pissa", "lora", "lisa", "state"]
ADAPTERS = ["bone", "pissa", "lora"]
CHECKPOINT = "checkpoints/step-000003.safetensors"


def resume(folder: Path, *more: str) -> None:
    """Resume a copy of a run. The paths in its config.yaml are relative, so the flags replace them."""
    inputs = ["--load_model", str(BASE), "--data_file", str(FILES / "data"), "--proj_dir", str(folder)]
    train_flags(["--config", str(folder / "config.yaml"), *inputs, "--resume", "auto", *more])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a run that was resumed after step 3. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("resumed")

    def resume_once(name: str) -> Path:
        if not (folder / name).exists():
            shutil.copytree(FILES / name, folder / name)
            for weights in (folder / name).glob("rwkv-1.*"):
                weights.unlink()
            resume(folder / name)
        return folder / name

    return resume_once


def compare_metrics(folder: Path, name: str) -> None:
    """Compare training and validation losses with those of the run that was not interrupted."""
    found, expected = metrics(folder), metrics(FILES / name)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for now, then in zip(found, expected, strict=True):
        for key in {"loss", "val_loss", "lr", "grad_norm"} & then.keys():
            assert now[key] == pytest.approx(then[key], rel=1e-6 if "loss" in key else 1e-5), (then["step"], key)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_from_its_checkpoint(name, resumed):
    compare_metrics(resumed(name), name)


@pytest.mark.parametrize("name", RUNS)
def test_a_config_keeps_every_setting(name, resumed):
    """config.yaml of the resumed run was written by the current code from the earlier file."""
    then = yaml.safe_load((FILES / name / "config.yaml").read_text())
    now = yaml.safe_load((resumed(name) / "config.yaml").read_text())
    for section, key in (("train", "load_model"), ("train", "proj_dir"), ("data", "data_file")):
        del then[section][key]
    for section, settings in then.items():
        assert {key: now[section][key] for key in settings} == settings, section


# ------------------------------------------------------------------------------------ trained weights


def logits(model: torch.nn.Module) -> Tensor:
    """Logits (1, 20, vocabulary) of fixed tokens."""
    tokens = torch.arange(1, 21).remainder(257).view(1, -1)
    with torch.no_grad():
        return model(tokens)[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_and_merges(name, resumed, tmp_path):
    adapter = FILES / name / "rwkv-1.safetensors"
    loaded = logits(load_with_adapter(BASE, adapter).model)
    assert loaded.isfinite().all()
    assert relative_error(loaded, logits(load_plain(BASE))) > 1e-3, "the adapter must matter"

    merge(BASE, adapter, tmp_path / "merged.pth")
    assert relative_error(logits(load_plain(tmp_path / "merged.pth")), loaded) < 1e-5

    same = load_with_adapter(BASE, resumed(name) / "rwkv-1.safetensors").model
    assert relative_error(logits(same), loaded) < 1e-5


def test_a_tuned_state_merges(resumed, tmp_path):
    merged = []
    for number, folder in enumerate((FILES / "state", resumed("state"))):
        merge_state(BASE, folder / "rwkv-1.pth", tmp_path / f"{number}.pth")
        merged.append(logits(load_plain(tmp_path / f"{number}.pth")))
    assert merged[0].isfinite().all()
    assert relative_error(merged[0], logits(load_plain(BASE))) > 1e-3, "the state must matter"
    assert relative_error(merged[1], merged[0]) < 1e-5


# ----------------------------------------------------------------------------- settings that came later


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    """The folder of the bone run, with a checkpoint written before three of the settings existed."""
    folder = tmp_path / "bone"
    shutil.copytree(FILES / "bone", folder)
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    settings = checkpoint.manifest["settings"]
    del settings["optim"]["grad_spike"], settings["data"]["long"], settings["peft"]["peft_config"]["rounding"]
    monkeypatch.setattr(checkpoint_file, "FORMAT_VERSION", 1)
    write_checkpoint(folder / CHECKPOINT, checkpoint.tensors, checkpoint.manifest)
    monkeypatch.undo()
    return folder


def test_a_setting_that_came_later_takes_its_default(older):
    resume(older)
    compare_metrics(older, "bone")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grad_spike", "3"], "--grad_spike: 3.0 differs from the checkpoint's 0.0"),
        (["--long", "split"], "--long: split differs from the checkpoint's truncate"),
        (
            ["--bone_config", '{"r":16,"rounding":"stochastic"}'],
            "--bone_config rounding: stochastic differs from the checkpoint's nearest",
        ),
    ],
    ids=["optimizer", "data", "method"],
)
def test_a_setting_that_came_later_must_have_its_default(flags, message, older):
    with pytest.raises(ConfigError, match=message):
        resume(older, *flags)


# ------------------------------------------------------------------------------------- newer versions


def test_a_newer_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bone"
    shutil.copytree(FILES / "bone", folder)
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    monkeypatch.setattr(checkpoint_file, "FORMAT_VERSION", 99)
    write_checkpoint(folder / CHECKPOINT, checkpoint.tensors, checkpoint.manifest)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"step-000003.*found 99, expected 2 or less.*newer version"):
        resume(folder, "--resume", str(folder / CHECKPOINT))
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be read"):
        resume(folder)
    assert "found 99, expected 2 or less" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_newer_adapter_is_refused(tmp_path):
    adapter, path = FILES / "bone" / "rwkv-1.safetensors", tmp_path / "rwkv-1.safetensors"
    info = read_adapter(adapter)[1]
    metadata = {key: json.dumps(value) for key, value in vars(info).items()} | {"format_version": "99"}
    save_file(load_file(adapter), path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"written by a newer version of this program; found format 99"):
        read_adapter(path)


def test_a_newer_config_is_refused(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("format_version: 99\n" + (FILES / "bone" / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"config.yaml was written by a newer version .*; found format_version 99"):
        train_flags(["--config", str(config)])
