"""What several test files need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.base_model import save_base
from rwkv_peft.config.sections import ModelConfig, PeftConfig
from rwkv_peft.model.init import model_from_scratch
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.registry import method_config

TINY = ModelConfig(n_layer=2, n_embd=64, vocab_size=80, head_size=32, dim_ffn=128, dim_att=64).resolved()
"""A model small enough for every test; its head size is not the public one."""


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def lively_model(config: ModelConfig = TINY, seed: int = 0, **options) -> RWKV6:
    """A model in which every parameter matters: RWKV-LM's init has zeros that hide mistakes."""
    model = model_from_scratch(config, seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def write_base(path: Path, config: ModelConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A lively base model as a `.pth`."""
    state = lively_model(config, seed).state_dict()
    save_base({key: tensor.to(dtype) for key, tensor in state.items()}, path)
    return path


def with_shape(**changes) -> ModelConfig:
    """TINY with other numbers."""
    return replace(TINY, **changes)


def peft_section(method: str, options: Mapping[str, Any] | None = None, **rest: Any) -> PeftConfig:
    """The `peft` section for a method and its options in plain form."""
    return PeftConfig(method=method_config(method, options or {}), **rest)
