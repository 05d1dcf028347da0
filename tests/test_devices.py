"""Device flags: dtype of the activations, number of processes, ZeRO stage."""

from __future__ import annotations

import pytest
import torch

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.devices import activation_dtype, devices_per_node, world_size
from rwkv_peft.errors import ConfigError


@pytest.mark.parametrize(
    ("strategy", "stage", "offloads"),
    [
        ("auto", 0, False),
        ("ddp", 0, False),
        ("deepspeed_stage_1", 1, False),
        ("deepspeed_stage_2", 2, False),
        ("deepspeed_stage_3", 3, False),
        ("deepspeed_stage_2_offload", 2, True),
        ("deepspeed_stage_3_offload", 3, True),
    ],
)
def test_zero_stage_and_offload_of_every_strategy(strategy, stage, offloads):
    train = TrainConfig(strategy=strategy)
    assert (train.zero_stage, train.offloads) == (stage, offloads)


def test_numbers_of_processes(monkeypatch):
    assert world_size(TrainConfig(accelerator="cpu", devices="3", num_nodes=2)) == 6
    assert devices_per_node(TrainConfig(accelerator="cpu", devices="auto")) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert world_size(TrainConfig(devices="auto", num_nodes=2)) == 8
    with pytest.raises(
        ConfigError, match="--devices: invalid value; found 5, expected at most 4, the GPUs of this machine"
    ):
        devices_per_node(TrainConfig(devices="5"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16", "accelerator": "cpu"}, "found fp16 on a CPU, expected fp32 or bf16"),
        ({"precision": "fp16", "strategy": "deepspeed_stage_2"}, "found fp16 with --strategy deepspeed_stage_2"),
    ],
)
def test_fp16_is_refused_on_cpus_and_under_deepspeed(settings, message):
    with pytest.raises(ConfigError, match=message):
        activation_dtype(TrainConfig(**settings))


def test_precision_of_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ConfigError, match="found bf16 on a GPU that does not support it, expected fp16 or fp32"):
        activation_dtype(TrainConfig(precision="bf16"))
    assert activation_dtype(TrainConfig(precision="fp16")) == torch.float16
    assert activation_dtype(TrainConfig()) == torch.float32
