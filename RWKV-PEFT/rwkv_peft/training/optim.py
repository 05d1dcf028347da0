"""AdamW and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from rwkv_peft.config import OptimConfig

DECAY_LR_SCALE = 2.0
"""RWKV-LM's multiplier of the learning rate for `time_decay`."""


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """The trained parameters, grouped by learning-rate multiplier (`lr_scale`) and weight decay (matrices only)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decay = name.endswith(".time_decay") and optim.layerwise_lr
        scale = DECAY_LR_SCALE if is_decay else 1.0
        weight_decay = optim.weight_decay if parameter.squeeze().ndim >= 2 else 0.0
        groups.setdefault((scale, weight_decay), []).append(parameter)
    return [
        {"params": params, "lr_scale": scale, "weight_decay": weight_decay}
        for (scale, weight_decay), params in groups.items()
    ]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(model, optim), lr=optim.lr_init, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps
    )
