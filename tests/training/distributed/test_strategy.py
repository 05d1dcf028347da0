"""What `--strategy` means to Lightning."""

from __future__ import annotations

import pytest
from pytorch_lightning.strategies import DDPStrategy

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.training.distributed.strategy import build_strategy


def test_one_device_needs_no_process_group():
    train = TrainConfig(accelerator="cpu")
    assert build_strategy(train) == {"strategy": "auto", "plugins": []}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_devices_exchange_gradients_and_no_buffers(strategy, unused):
    train = TrainConfig(accelerator="cpu", devices="2", strategy=strategy)
    built = build_strategy(train, unused=unused)["strategy"]
    assert isinstance(built, DDPStrategy)
    assert built._ddp_kwargs == {"forward_sync_buffers": False, "find_unused_parameters": unused}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_shares_out_by_stage(stage):
    built = build_strategy(TrainConfig(accelerator="cpu", strategy=f"deepspeed_stage_{stage}"))["strategy"]
    assert built.config["zero_optimization"]["stage"] == stage
    assert built.zero_stage_3 == (stage == 3)
