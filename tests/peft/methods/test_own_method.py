"""A method in a module of the user's own: the example of docs/methods.md, from flags to a merged model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from rwkv_peft.adapted_model import load_plain, load_with_adapter
from rwkv_peft.commands import merge as merge_command
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.export.merge import merge
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.peft.registry import method_config
from rwkv_peft.run_config import config_from_argv
from tests.helpers import relative_error
from tests.training.small_runs import train, write_inputs

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
(EXAMPLE,) = (code for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "METHOD = Method(" in code)
NAME = "my_package.my_method"


def write_module(folder: Path, name: str, code: str) -> None:
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder to import from. Modules that a test imports from it are forgotten afterwards."""
    before = set(sys.modules)
    folder = tmp_path / "modules"
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) is None or str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_documented_example_trains_saves_loads_and_merges(importable, tmp_path):
    write_module(importable, NAME, EXAMPLE)
    inputs, out, merged = write_inputs(tmp_path), tmp_path / "out", tmp_path / "merged.pth"
    train(out, inputs, "--peft", NAME, "--peft_config", '{"lr_ratio":100}')
    base, adapter = tmp_path / "base.pth", out / "rwkv-0.safetensors"
    tensors, info = read_adapter(adapter)
    assert (info.method, info.options) == (NAME, {"lr_ratio": 100.0})
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert config_from_argv(["--config", str(out / "config.yaml")]).peft.method == method_config(NAME, info.options)

    ids = torch.randint(257, (1, 9), generator=torch.Generator().manual_seed(0))
    trained = load_with_adapter(base, adapter).model(ids)[0]
    assert relative_error(trained, load_plain(base)(ids)[0]) > 1e-3
    merge(base, adapter, merged)
    assert relative_error(load_plain(merged)(ids)[0], trained) < 1e-5

    del sys.modules[NAME]  # as in another program
    with pytest.raises(
        CheckpointError, match=r"rwkv-0.safetensors: .*not part of this program. If .* pass --peft my_p"
    ):
        merge(base, adapter, tmp_path / "again.pth")
    assert NAME not in sys.modules, "a file must not import code"
    files = {"base_model": base, "adapter": adapter, "output": tmp_path / "again.pth"}
    merge_command.main([*(word for name, path in files.items() for word in (f"--{name}", str(path))), "--peft", NAME])
    assert torch.equal(load_plain(tmp_path / "again.pth")(ids)[0], load_plain(merged)(ids)[0])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, r"--peft: module my_package not found. Set PYTHONPATH"),
        ("", r"--peft: the module my_package.my_method has no METHOD; found none, expected METHOD = Method"),
        ("METHOD = 5", "has no METHOD; found 5, expected METHOD = Method"),
        ("import nothing_of_this_name", r"cannot be imported \(No module named 'nothing_of_this_name'\)"),
        ("from torch import nothing_of_this_name", "cannot be imported .*nothing_of_this_name"),
        (EXAMPLE.replace("name = __name__", 'name = "ia3"'), "found 'ia3', expected name = __name__"),
    ],
)
def test_a_module_that_cannot_be_used(code, message, importable):
    if code is not None:
        write_module(importable, NAME, code)
    with pytest.raises(ConfigError, match=message):
        config_from_argv(["--peft", NAME, "--n_layer", "1", "--n_embd", "64", "--dry_run"])


def test_options_of_an_own_method_are_checked(importable):
    write_module(importable, "my_method", EXAMPLE)  # a module outside of any package will do
    for options, message in (
        ('{"lr_ratios":1}', r"--peft_config lr_ratios: unknown option; expected lr_ratio. Did you mean lr_ratio\?"),
        ('{"lr_ratio":"1"}', "--peft_config lr_ratio: invalid value; found '1', expected a number"),
    ):
        flags = ["--peft", "my_method", "--peft_config", options, "--n_layer", "1", "--n_embd", "64", "--dry_run"]
        with pytest.raises(ConfigError, match=message):
            config_from_argv(flags)
