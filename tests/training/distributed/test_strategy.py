"""What `--strategy` means to Lightning."""

from __future__ import annotations

import pytest
from pytorch_lightning.strategies import DDPStrategy

from rwkv_peft.config.sections import OptimConfig, TrainConfig
from rwkv_peft.training.distributed.strategy import build_strategy

OPTIM = OptimConfig(accumulate_grad_batches=3, grad_clip=0.5)


def test_one_device_needs_no_process_group():
    train = TrainConfig(accelerator="cpu")
    assert build_strategy(train, OPTIM) == {"strategy": "auto", "plugins": []}


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_devices_exchange_gradients_but_not_buffers(strategy, find_unused):
    train = TrainConfig(accelerator="cpu", devices="2", strategy=strategy)
    built = build_strategy(train, OPTIM, find_unused=find_unused)["strategy"]
    assert isinstance(built, DDPStrategy)
    assert built._ddp_kwargs == {"forward_sync_buffers": False, "find_unused_parameters": find_unused}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_shards_by_stage(stage):
    built = build_strategy(TrainConfig(accelerator="cpu", strategy=f"deepspeed_stage_{stage}"), OPTIM)["strategy"]
    assert built.config["zero_optimization"]["stage"] == stage
    assert built.zero_stage_3 == (stage == 3)
    assert built.config["gradient_clipping"] == 0.5
    assert built.micro_batches == 3
