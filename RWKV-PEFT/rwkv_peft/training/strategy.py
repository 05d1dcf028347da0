"""Devices, precision and DeepSpeed: what the flags mean on this machine."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def device_type(train: TrainConfig) -> str:
    """`cuda` or `cpu`; raises ConfigError where a GPU is asked for and there is none."""
    has_gpu = torch.cuda.is_available()
    if train.accelerator == "gpu" and not has_gpu:
        raise ConfigError(
            "accelerator", found="no CUDA device", expected="one for gpu", hint="Use --accelerator cpu, or auto."
        )
    return "cuda" if has_gpu and train.accelerator != "cpu" else "cpu"


def activation_dtype(train: TrainConfig) -> torch.dtype:
    """The model's arithmetic; `auto` is bf16 on a GPU that has it, else fp32.

    Raises:
        ConfigError: fp16 on a CPU, bf16 on a GPU without it.
    """
    device = device_type(train)
    has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "auto":
        return torch.bfloat16 if device == "cuda" and has_bf16 else torch.float32
    if train.precision == "fp16" and device == "cpu":
        raise ConfigError("precision", found="fp16 on a CPU", expected="fp32 or bf16")
    if train.precision == "fp16":
        hint = "Its loss scaling has not been tested on a GPU yet."
        raise ConfigError("precision", found="fp16", expected="bf16 or fp32", hint=hint)
    if train.precision == "bf16" and not has_bf16:
        raise ConfigError("precision", found="bf16 on a GPU without it", expected="fp32")
    return DTYPES[train.precision]


class KeepDtypes(DeepSpeedPrecision):
    """The model casts for itself: its frozen bf16 weights stay bf16, where Lightning would widen all to fp32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed, also on CPUs (gloo), and with the loss divided once under accumulation."""

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        # Lightning refuses CPUs here, though the engine runs on them; it addresses devices by index.
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the accumulated batches; DeepSpeed would divide it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def build_strategy(train: TrainConfig) -> dict[str, Any]:
    """The trainer's arguments for `--strategy`."""
    if not train.strategy.startswith("deepspeed"):
        return {"strategy": train.strategy}
    stage = int(train.strategy.rsplit("_", 1)[1])
    return {"strategy": DeepSpeed(stage=stage), "plugins": [KeepDtypes()]}


def devices_per_node(train: TrainConfig) -> int:
    """Processes on this machine: `--devices`, where auto is every GPU, or one on a CPU."""
    if train.devices != "auto":
        there = torch.cuda.device_count()
        if device_type(train) == "cuda" and int(train.devices) > there:
            raise ConfigError("devices", found=train.devices, expected=f"at most {there}, the GPUs of this machine")
        return int(train.devices)
    return torch.cuda.device_count() if device_type(train) == "cuda" else 1
