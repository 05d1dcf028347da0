"""Versions of Lightning and DeepSpeed that the code was not tested with are refused before training."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

import pytest

from rwkv_peft.config.sections import OptimConfig, TrainConfig
from rwkv_peft.errors import UserError
from rwkv_peft.training.distributed import versions
from rwkv_peft.training.distributed.strategy import build_strategy
from rwkv_peft.training.distributed.versions import TESTED, check_versions


@pytest.fixture
def installed(monkeypatch):
    """A function that pretends that a version of every package is installed; None: the package is missing."""

    def pretend(number: str | None) -> None:
        def find(name: str) -> str:
            if number is None:
                raise PackageNotFoundError(name)
            return number

        monkeypatch.setattr(versions, "version", find)

    return pretend


def test_the_installed_versions_are_accepted():
    check_versions(*TESTED)
    assert all(version(name).split(".")[:2] == tested.split(".")[:2] for name, tested in TESTED.items())


def test_another_patch_release_is_accepted(installed, monkeypatch):
    monkeypatch.setattr(versions, "TESTED", {"deepspeed": "0.19.8"})
    for number in ("0.19.0", "0.19.10", "0.19.8+cpu"):
        installed(number)
        check_versions("deepspeed")


@pytest.mark.parametrize("number", ["0.18.8", "0.20.0", "1.19.8", "0.190.8"])
def test_another_minor_version_is_refused(number, installed, monkeypatch):
    monkeypatch.setattr(versions, "TESTED", {"deepspeed": "0.19.8"})
    installed(number)
    expected = re.escape(
        f"deepspeed: wrong version installed; found {number}, expected 0.19.x. "
        "Install the tested version: pip install deepspeed==0.19.8"
    )
    with pytest.raises(UserError, match=expected):
        check_versions("deepspeed")


def test_a_missing_package_is_reported(installed):
    installed(None)
    with pytest.raises(UserError, match=r"pytorch-lightning: not installed; expected 2\.\d+\.x\. .* pip install"):
        check_versions("pytorch-lightning")


def test_only_zero_needs_deepspeed(installed, monkeypatch):
    checked = []
    monkeypatch.setattr("rwkv_peft.training.distributed.strategy.check_versions", lambda *names: checked.extend(names))
    for strategy in ("auto", "ddp", "deepspeed_stage_1"):
        build_strategy(TrainConfig(accelerator="cpu", strategy=strategy), OptimConfig())
    assert checked == ["pytorch-lightning", "pytorch-lightning", "pytorch-lightning", "deepspeed"]
