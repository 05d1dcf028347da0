"""AdamW and its parameter groups."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch
from torch import nn

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.injection import adapter_parameters, lr_scales
from rwkv_peft.training.distributed.offload import cpu_adamw

DECAY_LR_SCALE = 2.0
"""RWKV-LM's multiplier of the learning rate for `time_decay`."""


def parameter_groups(model: nn.Module, optim: OptimConfig, *, by_block: bool = False) -> list[dict]:
    """Return the trainable parameters, grouped by learning-rate multiplier (`lr_scale`) and weight decay.

    Only matrices decay. Multipliers are relative to the rate that starts at lr_init. An adapter's is lr_bone / lr_init,
    times the method's own (LoRA+'s ratio); a base parameter's is RWKV-LM's.

    Args:
        model: any module with trainable parameters marked.
        optim: weight decay, the adapter's rate, and whether RWKV-LM's rules for `time_*` apply.
        by_block: make separate groups per block; a group's `block` is its block's number, or None outside the blocks.
    """
    methods_scales, adapters = lr_scales(model), adapter_parameters(model)
    adapter_scale = optim.lr_bone / optim.lr_init if optim.lr_bone else 1.0
    groups: dict[tuple[float, float, int | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in adapters:
            scale, decays = adapter_scale * methods_scales.get(name, 1.0), parameter.ndim >= 2
        else:
            scale, decays = _base_rule(name, parameter, bool(optim.layerwise_lr))
        in_block = re.match(r"blocks\.(\d+)\.", name) if by_block else None
        key = (scale, optim.weight_decay if decays else 0.0, int(in_block[1]) if in_block else None)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr_scale": scale, "weight_decay": weight_decay, "block": block}
        for (scale, weight_decay, block), params in groups.items()
    ]


def _base_rule(name: str, parameter: nn.Parameter, layerwise: bool) -> tuple[float, bool]:
    """Return a base parameter's rate multiplier and whether it has weight decay, by RWKV-LM's x060 rules.

    RWKV stores vectors with shape (1, 1, C). With `layerwise`, `time_*` parameters have no weight decay, not even
    matrices.
    """
    is_matrix = parameter.squeeze().ndim >= 2
    if not layerwise:
        return 1.0, is_matrix
    own = name.rpartition(".")[2]
    return DECAY_LR_SCALE if own == "time_decay" else 1.0, is_matrix and not own.startswith("time_")


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, by_block: bool = False, offload: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of `--optim` over the trainable parameters; with `offload`, DeepSpeed's AdamW for CPUs.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    groups = parameter_groups(model, optim, by_block=by_block)
    options = {"lr": optim.lr_init, "betas": (optim.beta1, optim.beta2), "eps": optim.adam_eps}
    if offload:
        return cpu_adamw(groups, **options)
    if optim.optim == "adam_8bit":
        return _adamw_8bit(groups, options)
    parameters = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.AdamW(groups, **options, fused=_fuses(parameters))


def _fuses(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch has a fused AdamW for these parameters, which is 3x as fast on a CPU (docs/training.md)."""
    return all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)


def _adamw_8bit(groups: list[dict], options: dict) -> torch.optim.Optimizer:
    # On import it may warn that a kernel for generation is missing; that kernel is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        what = f"needs the package bitsandbytes, which cannot be imported ({error})"
        raise ConfigError("optim", "adam_8bit", what=what, hint="Try: pip install bitsandbytes==0.50.2") from error
    return AdamW8bit(groups, **options)
