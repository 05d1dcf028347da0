"""Options of the methods: errors, and the spellings of other programs."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Literal

import pytest
import torch

from rwkv_peft.adapted_model import add_adapter, warm_start
from rwkv_peft.base_model import save_base
from rwkv_peft.config.field_types import field_types
from rwkv_peft.config.method import METHODS
from rwkv_peft.config.spellings import canonical
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.peft.base import LayerConfig
from rwkv_peft.peft.injection import inject, peft_layers
from rwkv_peft.peft.registry import method_config, method_named
from tests.helpers import lively_model, peft_section
from tests.peft.definitions import gradients_of

WRONG = {
    int: ["64", 2.5, True, None],
    float: ["1.0", True, None],
    bool: [2, 0.5, "true", None],
    str: [5, None, True, ["row"]],
    Mapping: ["key", 4, None, [["key", 4]], {"key": "4"}],
    Literal: ["rows", 5, None, True],
}


def test_a_value_of_the_wrong_type_is_refused_for_every_option():
    for method in METHODS:
        for key, kind in field_types(method_named(method).config).items():
            for value in WRONG[typing.get_origin(kind) or kind]:
                with pytest.raises(ConfigError, match=rf"--{method}_config {key}: invalid value; found .*, expected "):
                    method_config(method, {key: value})


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_names_the_nearest(method):
    with pytest.raises(ConfigError, match=rf"--{method}_config zzz: unknown option; expected (\w+[,.]|no options)"):
        method_config(method, {"zzz": 8})
    for key in field_types(method_named(method).config):
        with pytest.raises(ConfigError, match=rf"--{method}_config {key}s: unknown option.*Did you mean {key}\?"):
            method_config(method, {f"{key}s": 8})


NAN, INFINITE = float("nan"), float("inf")  # both are numbers to Python's JSON

WITH_RANK = [name for name in METHODS if issubclass(method_named(name).config, LayerConfig)]

OUT_OF_RANGE = {
    "lora": [
        *({"dropout": value} for value in (-0.1, 1.0, NAN)),
        *({"lr_ratio": value} for value in (0.0, -1.0, INFINITE, NAN)),
        *({"alpha": value} for value in (0, -1.0, INFINITE, NAN)),
        *({"rank_pattern": {"key": r}} for r in (0, "4", 2.5, True)),
    ],
    "pissa": [{"svd_niter": -1}],
    "lora_ga": [{"gamma": 0.0}, {"gamma": NAN}, {"samples": 0}],
    "prompt": [{"tokens": 0}],
    "lisa": [{"layers": 0}, {"interval": 0}],
    "bone": [
        {"mode": "rows"},
        {"g": -1, "mode": "group"},
        {"g": 0, "mode": "group"},
        {"g": 4},
        {"rounding": "stochastic", "mode": "group", "g": 4},
        {"rounding": "up"},
        {"impl": "slow"},
        {"cp": 2},
    ],
}
"""The first option of each is wrong."""


@pytest.mark.parametrize("method", OUT_OF_RANGE)
def test_a_value_out_of_range(method):
    for options in OUT_OF_RANGE[method]:
        key = next(iter(options))
        with pytest.raises(ConfigError, match=rf"--{method}_config {key}.*: invalid value; found .*, expected "):
            method_config(method, options)


@pytest.mark.parametrize("method", WITH_RANK)
def test_an_r_below_1(method):
    with pytest.raises(ConfigError, match=f"--{method}_config r: invalid value; found 0, expected a positive integer"):
        method_config(method, {"r": 0})


BIG = {"rank_pattern": {"blocks.1.ffn.value": 48}}
"""Only the last of all targets does not fit: nothing may be left half injected."""


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *(("bone", {"r": 16, "mode": m} | BIG, "r=48: does not fit blocks.1.ffn.value.weight .64 x 128.: 48 does not "
           "divide 64. These r divide both: 8, 16, 32, 64") for m in "row col left unconstrained hadamard".split()),
        ("bone", {"r": 16, "mode": "group", "g": 12}, "g=12: does not divide the 16 blocks of blocks.0.att.receptance"),
        ("bone", {"r": 16, "mode": "group", "g": 32}, "g=32: does not divide the 16 blocks of blocks.0.att.receptance"),
        ("miss", {"r": 16} | BIG, "r=48: does not fit blocks.1.ffn.value.weight .64 x 128.: 48 does not divide 128. "
         "These r divide it: 8, 16, 32, 64, 128"),
        ("pissa", {"r": 65}, "r=65: is too large for blocks.0.att.receptance.weight .64 x 64.; expected at most 64"),
        ("olora", {"r": 4, "rank_pattern": {"blocks.1.ffn.value": 65}}, "r=65: is too large for blocks.1.ffn.value"),
        ("lora_ga", {"r": 33}, "r=33: is too large for blocks.0.att.receptance.weight .64 x 64.; expected at most 32"),
    ],
)  # fmt: skip
def test_an_r_that_does_not_fit_injects_nothing(method, options, message):
    model = lively_model()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=f"--{method}_config {message}"):
        inject(model, method_config(method, options), gradients=gradients_of(model))
    assert peft_layers(model) == {}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


@pytest.mark.parametrize(("method", "r"), [("pissa", 64), ("olora", 64), ("lora_ga", 32), ("lora", 100), ("miss", 64)])
def test_the_largest_r_fits(method, r):
    model = lively_model()
    add_adapter(model, peft_section(method, {"r": r}), gradients=gradients_of(model))
    assert model(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()


def test_lora_ga_wants_gradients_of_all_targets_or_injects_nothing():
    model = lively_model()
    gradients = gradients_of(model)
    del gradients["blocks.1.ffn.value"]
    for given in (None, gradients):
        with pytest.raises(ValueError, match="lora_ga starts from gradients of the weights"):
            inject(model, method_config("lora_ga", {"r": 4}), gradients=given)
        assert peft_layers(model) == {}
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        (("bone", {"bone_r": 32, "bone_load": ""}), ("bone", {"r": 32, "load": ""})),
        (("bone", {"r": 32, "bone_mode": "bat"}), ("bone", {"r": 32, "mode": "row"})),
        (("bone", {"r": 32, "bone_mode": "col"}), ("bone", {"r": 32, "mode": "col"})),
        (("bone", {"r": 32, "bone_mode": "bone"}), ("miss", {"r": 32})),
        (("bone", {"r": 32, "mode": "bone"}), ("miss", {"r": 32})),
        (("bone", {"r": 32, "init_weights": "bat"}), ("bone", {"r": 32, "mode": "col"})),
        (("disha", {"r": 32, "mode": "bat", "load": ""}), ("bone", {"r": 32, "mode": "row", "load": ""})),
        (("disha", {"r": 32, "mode": "bone"}), ("miss", {"r": 32})),
        (("disha", {"disha_r": 32}), ("miss", {"r": 32})),
        (("disha", {"r": 32, "mode": "col"}), ("bone", {"r": 32, "mode": "col"})),
        (("lora", {"lora_r": 8, "lora_alpha": 16, "dropout": 0.1}), ("lora", {"r": 8, "alpha": 16, "dropout": 0.1})),
        (("miss", {"miss_r": 8}), ("miss", {"r": 8})),
        (("pissa", {"pissa_init": "", "pissa_r": 8}), ("pissa", {"r": 8})),
        (("none", {}), ("none", {})),
    ],
)  # fmt: skip
def test_spellings(spelled, meant):
    method, options = spelled
    before = dict(options)
    assert canonical(method, options) == meant
    assert options == before, "the caller's options are left alone"
    assert canonical(*meant) == meant


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bone", {"r": 8, "bone_r": 16}, "an option is given twice"),
        (
            "bone",
            {"mode": "row", "init_weights": "bat"},
            "init_weights: invalid value; found bat, expected bat, or mode",
        ),
        ("bone", {"init_weights": True}, "init_weights: invalid value; found True"),
        ("bone", {"mode": "bat"}, "Hugging Face's bat is col; RWKV-PEFT's bone_mode bat is row"),
        ("disha", {"mode": "rows"}, "mode: invalid value; found 'rows'"),
        ("bonn", {}, r"--peft: unknown method; found bonn, .*Did you mean bone\?"),
    ],
)
def test_spellings_that_contradict_themselves(method, options, message):
    with pytest.raises(ConfigError, match=message):
        method_config(method, options)


@pytest.mark.parametrize("suffix", ["bone", "disha"])
@pytest.mark.parametrize(("method", "shape"), [("bone", (4, 16, 16)), ("miss", (16, 64))])
def test_a_pth_of_rwkv_peft_is_recognized_by_its_axes(suffix, method, shape, tmp_path):
    """Under either suffix, three axes are Bone row and two are MiSS; loading as the other method is an error."""
    torch.manual_seed(0)
    tensors = {f"blocks.{n}.att.key.{suffix}": torch.randn(shape) for n in range(2)}
    save_base(tensors, tmp_path / "theirs.pth")

    def load(method: str):
        model = lively_model()
        options = {"r": 16, "load": str(tmp_path / "theirs.pth")}
        peft = peft_section(method, options, peft_targets=("att.key",))
        add_adapter(model, peft, start=warm_start(peft.method, {}, "base.pth"))
        return model

    model = load(method)
    for n in range(2):
        theirs = tensors[f"blocks.{n}.att.key.{suffix}"]
        assert torch.equal(getattr(model.blocks[n].att.key, method), theirs)
    with pytest.raises(CheckpointError, match=r"theirs\.pth: "):
        load("miss" if method == "bone" else "bone")


def test_a_pth_of_rwkv_peft_is_no_other_mode(tmp_path):
    peft = peft_section("bone", {"r": 16, "mode": "col", "load": "theirs.pth"})
    with pytest.raises(CheckpointError, match=r"theirs.pth: RWKV-PEFT's .pth adapters are Bone row; found col"):
        warm_start(peft.method, {}, "base.pth")
