"""What the device flags mean on this machine: device, dtype, number of processes. Needs torch only."""

from __future__ import annotations

from typing import Any

import torch

from rwkv_peft.config.sections import TrainConfig
from rwkv_peft.errors import ConfigError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

UNSHARDED_BELOW = 2**20
"""ZeRO-3 shards only parameters with at least this many elements. Adapter matrices have fewer (Bone r=64 on a 4096 x
14336 layer has 917,504): gathering each of them for every product would cost more than sharding saves."""


def device_type(train: TrainConfig) -> str:
    """Return `cuda` or `cpu`.

    Raises:
        ConfigError: `--accelerator gpu` on a machine without one.
    """
    has_gpu = torch.cuda.is_available()
    if train.accelerator == "gpu" and not has_gpu:
        raise ConfigError("accelerator", what="no CUDA device was found", hint="Use --accelerator cpu, or auto.")
    return "cuda" if has_gpu and train.accelerator != "cpu" else "cpu"


def activation_dtype(train: TrainConfig) -> torch.dtype:
    """Return the dtype of the model's activations; `auto` is bf16 on a GPU that supports it, otherwise fp32.

    Raises:
        ConfigError: fp16 on a CPU, or bf16 on a GPU that does not support it.
    """
    device = device_type(train)
    has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "auto":
        return torch.bfloat16 if device == "cuda" and has_bf16 else torch.float32
    if train.precision == "fp16" and device == "cpu":
        raise ConfigError("precision", found="fp16 on a CPU", expected="fp32 or bf16")
    if train.precision == "bf16" and not has_bf16:
        raise ConfigError("precision", found="bf16 on a GPU that does not support it", expected="fp16 or fp32")
    return DTYPES[train.precision]


def model_options(train: TrainConfig) -> dict[str, Any]:
    """Return the keyword arguments of `RWKV6` that flags decide."""
    return {
        "dtype": activation_dtype(train),
        "grad_cp": bool(train.grad_cp),
        "wkv_backend": train.wkv,
    }


def devices_per_node(train: TrainConfig) -> int:
    """Return the number of processes on this machine: `--devices`; auto means every GPU, or one process on a CPU."""
    if train.devices != "auto":
        count = torch.cuda.device_count()
        if device_type(train) == "cuda" and int(train.devices) > count:
            raise ConfigError("devices", found=train.devices, expected=f"at most {count}, the GPUs of this machine")
        return int(train.devices)
    return torch.cuda.device_count() if device_type(train) == "cuda" else 1


def world_size(train: TrainConfig) -> int:
    """Return the number of processes of the run, over all machines."""
    return devices_per_node(train) * train.num_nodes
