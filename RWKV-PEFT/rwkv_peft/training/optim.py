"""AdamW and its parameter groups."""

from __future__ import annotations

import re

import torch
from torch import nn

from rwkv_peft.config import OptimConfig
from rwkv_peft.peft.injection import lr_scales
from rwkv_peft.training.offload import cpu_adamw

DECAY_LR_SCALE = 2.0
"""RWKV-LM's multiplier of the learning rate for `time_decay`."""


def parameter_groups(model: nn.Module, optim: OptimConfig, *, by_block: bool = False) -> list[dict]:
    """The trained parameters, grouped by learning-rate multiplier (`lr_scale`) and weight decay (matrices only).

    Args:
        model: any module with marked parameters.
        optim: weight decay, and whether RWKV-LM's multipliers count.
        by_block: keep the blocks apart: a group's `block` is the number of its block, None outside of the blocks.
    """
    methods_scales = lr_scales(model)
    groups: dict[tuple[float, float, int | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decay = name.endswith(".time_decay") and optim.layerwise_lr
        scale = DECAY_LR_SCALE if is_decay else methods_scales.get(name, 1.0)
        in_block = re.match(r"blocks\.(\d+)\.", name) if by_block else None
        weight_decay = optim.weight_decay if parameter.squeeze().ndim >= 2 else 0.0
        groups.setdefault((scale, weight_decay, int(in_block[1]) if in_block else None), []).append(parameter)
    return [
        {"params": params, "lr_scale": scale, "weight_decay": weight_decay, "block": block}
        for (scale, weight_decay, block), params in groups.items()
    ]


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, by_block: bool = False, offload: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the groups of `parameter_groups`; with `offload` the one that DeepSpeed runs on CPUs."""
    groups = parameter_groups(model, optim, by_block=by_block)
    make = cpu_adamw if offload else torch.optim.AdamW
    return make(groups, lr=optim.lr_init, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps)
