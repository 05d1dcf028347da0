"""Which layers are replaced and which parameters train."""

from __future__ import annotations

import pytest
import torch

from rwkv_peft.assembly import add_adapter
from rwkv_peft.config import PeftConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.peft.adapter_io import read_adapter
from rwkv_peft.peft.inject import inject, mark_trainable
from rwkv_peft.peft.registry import method_config
from tests.helpers import TINY


def test_default_targets_are_the_linears_of_time_mix_and_channel_mix():
    model = model_on_meta(TINY)
    base_keys = set(model.state_dict())
    targets = add_adapter(model, PeftConfig(peft="bone", peft_config={"r": 16}))
    linears = ["att.receptance", "att.key", "att.value", "att.output", "att.gate"]
    linears += ["ffn.key", "ffn.receptance", "ffn.value"]
    assert targets == [f"blocks.{layer}.{name}" for layer in range(TINY.n_layer) for name in linears]
    keys = set(model.state_dict())
    assert base_keys <= keys, "base names must not change"
    assert keys - base_keys == {f"{name}.bone" for name in targets}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == keys - base_keys


def test_train_parts_match_whole_segments():
    model = model_on_meta(TINY)
    trained = mark_trainable(model, "none", ["time", "ln"])
    last = {name.split(".")[-1] for name in trained if ".time_" in name}
    assert all(".time_" in name or "ln" in name.split(".")[-2] for name in trained)
    assert {"time_decay", "time_maa_w1", "time_faaaa", "time_maa_r"} <= last
    assert {"ln_out.weight", "blocks.0.ln0.bias", "blocks.1.att.ln_x.weight"} <= set(trained)
    assert mark_trainable(model, "none", ["emb"]) == ["emb.weight"]
    assert len(mark_trainable(model, "none", ["time_maa_?1"])) == TINY.n_layer


def test_none_trains_everything():
    model = model_on_meta(TINY)
    assert len(mark_trainable(model, "none")) == len(list(model.parameters()))


def test_patterns_that_match_nothing_are_errors():
    model = model_on_meta(TINY)
    with pytest.raises(ConfigError, match=r"blocks.0.att.kei: matches no linear layer. Near names: blocks.0.att.key"):
        inject(model, "bone", method_config("bone", {"r": 16}), targets=["blocks.0.att.kei"])
    with pytest.raises(ConfigError, match=r"--train_parts tim: names no parameter.*time_decay"):
        mark_trainable(model, "bone", ["tim"])


def test_trained_base_parameters_become_fp32():
    model = model_on_meta(TINY).bfloat16()
    mark_trainable(model, "none", ["ln"])
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
    with pytest.raises(CheckpointError, match="found format None, expected format 1"):
        read_adapter(path)
