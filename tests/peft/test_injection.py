"""Which layers are replaced and which parameters train."""

from __future__ import annotations

import pytest
import torch

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.method import FullConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.peft.adapter_file import FORMAT_VERSION, read_adapter
from rwkv_peft.peft.injection import inject, mark_trainable, peft_layers, targeted
from rwkv_peft.peft.methods.bone import BoneConfig
from rwkv_peft.peft.registry import method_config
from tests.helpers import TINY, lively_model, peft_section


def test_default_targets_are_the_linears_of_time_mix_and_channel_mix():
    model = model_on_meta(TINY)
    base_keys = set(model.state_dict())
    targets = add_adapter(model, peft_section("bone", {"r": 16}))
    linears = ["att.receptance", "att.key", "att.value", "att.output", "att.gate"]
    linears += ["ffn.key", "ffn.receptance", "ffn.value"]
    assert targets == [f"blocks.{layer}.{name}" for layer in range(TINY.n_layer) for name in linears]
    keys = set(model.state_dict())
    assert base_keys <= keys, "base names must not change"
    assert keys - base_keys == {f"{name}.bone" for name in targets}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == keys - base_keys


def test_train_parts_match_whole_segments():
    model = model_on_meta(TINY)
    trained = mark_trainable(model, FullConfig(), ["time", "ln"])
    last = {name.split(".")[-1] for name in trained if ".time_" in name}
    assert all(".time_" in name or "ln" in name.split(".")[-2] for name in trained)
    assert {"time_decay", "time_maa_w1", "time_faaaa", "time_maa_r"} <= last
    assert {"ln_out.weight", "blocks.0.ln0.bias", "blocks.1.att.ln_x.weight"} <= set(trained)
    assert mark_trainable(model, FullConfig(), ["emb"]) == ["emb.weight"]
    assert len(mark_trainable(model, FullConfig(), ["time_maa_?1"])) == TINY.n_layer


def test_none_trains_everything():
    model = model_on_meta(TINY)
    assert len(mark_trainable(model, FullConfig())) == len(list(model.parameters()))


def linears(*names: str) -> list[str]:
    return [f"blocks.{n}.{name}" for n in range(TINY.n_layer) for name in names]


ATT = ("att.receptance", "att.key", "att.value", "att.output", "att.gate")
FFN = ("ffn.key", "ffn.receptance", "ffn.value")


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (("att",), linears(*ATT)),
        (("ffn",), linears(*FFN)),
        (("ffn", "att"), linears(*ATT, *FFN)),
        (("head",), ["head"]),
        (("emb",), ["emb"]),
        (("head", "emb", "att.gate"), ["emb", *linears("att.gate"), "head"]),
        (("key",), linears("att.key", "ffn.key")),
        (("att.k?y",), linears("att.key")),
        (("blocks.1.*",), linears(*ATT, *FFN)[8:]),
        (("blocks.[01].ffn.value",), linears("ffn.value")),
        (("*",), [*linears(*ATT, *FFN), "head"]),
        (("key", "att.key", "blocks.0.att.key"), linears("att.key", "ffn.key")),
    ],
)
def test_targets(targets, chosen):
    """In the model's order, each once; an embedding only by its name."""
    model = model_on_meta(TINY)
    peft = peft_section("bone", {"r": 16}, peft_targets=targets)
    assert targeted(model, peft.method, peft.peft_targets) == chosen
    assert inject(model, peft.method, peft.peft_targets) == chosen
    assert list(peft_layers(model)) == chosen
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{name}.bone" for name in chosen}


def test_adapter_layers_sit_before_the_residual_stream():
    model = model_on_meta(TINY)
    assert inject(model, method_config("adapter", {"r": 8})) == linears("att.output", "ffn.value")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("blocks.0.att.kei",),
            r"peft_targets blocks.0.att.kei: matches no linear layer. Similar names: blocks.0.att.key",
        ),
        (("key", "heed"), "peft_targets heed: matches no linear layer. Similar names: head"),
        (("att.*.key",), r"peft_targets att.\*.key: matches no linear layer. Similar names: blocks"),
        (("em?",), r"peft_targets em\?: matches no linear layer. Similar names: emb"),
        (("ln_out",), "peft_targets ln_out: matches no linear layer"),
        (("tt.key",), "peft_targets tt.key: matches no linear layer"),
    ],
)
def test_targets_that_match_nothing(targets, message):
    """Before anything is replaced."""
    model = model_on_meta(TINY)
    with pytest.raises(ConfigError, match=message):
        inject(model, method_config("bone", {"r": 16}), targets)
    assert peft_layers(model) == {}


def test_ranks_by_pattern():
    """The last matching pattern counts. A matched layer that is not a target does not change."""
    model = lively_model()
    patterns = {"key": 8, "blocks.1.att.key": 2, "head": 3}
    options = {"r": 4, "alpha": 8.0, "rank_pattern": patterns}
    inject(model, method_config("lora", options), ("att", "ffn.key"))
    ranks = {name: layer.lora_A.shape[0] for name, layer in peft_layers(model).items()}
    expected = dict.fromkeys([*linears(*ATT, "ffn.key")], 4)
    expected |= dict.fromkeys(linears("att.key", "ffn.key"), 8) | {"blocks.1.att.key": 2}
    assert ranks == expected
    for name, layer in peft_layers(model).items():
        assert layer.lora_B.shape[1] == ranks[name]
        assert layer.config.scaling == 8.0 / ranks[name], "alpha / r of the layer's own r"


def test_block_sizes_by_pattern():
    model = model_on_meta(TINY)
    options = {"r": 16, "mode": "col", "rank_pattern": {"ffn.value": 32}}
    inject(model, method_config("bone", options))
    assert model.blocks[0].ffn.value.bone.shape == (2, 32, 32)
    assert model.blocks[0].att.key.bone.shape == (4, 16, 16)


def test_a_rank_pattern_that_matches_nothing():
    peft = peft_section("miss", {"r": 16, "rank_pattern": {"kei": 8}})
    with pytest.raises(ConfigError, match=r"--miss_config rank_pattern kei: matches no linear layer. Similar names: "):
        inject(model_on_meta(TINY), peft.method, peft.peft_targets)


def test_parts_that_name_nothing_are_errors():
    with pytest.raises(ConfigError, match=r"--train_parts tim: matches no parameter.*time_decay"):
        mark_trainable(model_on_meta(TINY), BoneConfig(), ["tim"])


def test_trained_base_parameters_become_fp32():
    model = model_on_meta(TINY).bfloat16()
    mark_trainable(model, FullConfig(), ["ln"])
    assert model.ln_out.weight.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16


def test_damaged_adapter_files(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no such adapter"):
        read_adapter(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"a.safetensors: not a readable .safetensors"):
        read_adapter(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=f"found format None, expected format {FORMAT_VERSION}"):
        read_adapter(path)
