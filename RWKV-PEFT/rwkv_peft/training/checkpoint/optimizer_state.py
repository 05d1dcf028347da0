"""The state of an optimizer as full tensors by name, whichever strategy shards it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.distributed.sharding import Shard, inner_optimizer, shards

MODEL = "model"
"""Prefix of a parameter's own values, next to prefixes such as `exp_avg` for the optimizer's state of it."""

Scalars = dict[str, dict[str, int | float]]
"""State that is one number per parameter (`step`), by key and by the parameter's name."""


def gather_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Any, *, keep: bool
) -> tuple[dict[str, Tensor], Scalars]:
    """Gather full tensors by name under any sharding strategy, as copies on the CPU: `model/NAME`, `exp_avg/NAME`, ...

    Under ZeRO all processes must call this together.

    Args:
        parameters: trainable parameters by name.
        optimizer: torch's, or DeepSpeed's around it.
        keep: whether this process wants the tensors; others get none.
    Raises:
        CheckpointError: a state tensor has another size than its sharded parameter.
    """
    tensors: dict[str, Tensor] = {}
    scalars: Scalars = {}
    state = inner_optimizer(optimizer).state
    for name, shard in shards(parameters, optimizer).items():
        for key, value in {MODEL: shard.holder, **state.get(shard.holder, {})}.items():
            if not isinstance(value, Tensor) or value.ndim == 0 < shard.holder.ndim:
                scalars.setdefault(key, {})[name] = value.item() if isinstance(value, Tensor) else value
                continue
            if not shard.is_whole and value.shape != shard.holder.shape:
                raise CheckpointError(name, f"the optimizer's {key} has another size than the parameter")
            whole = shard.gather(value)
            if keep:
                tensors[f"{key}/{name}"] = whole.to("cpu", copy=True)
    return tensors, scalars


@torch.no_grad()
def restore_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Any, tensors: Mapping[str, Tensor], scalars: Scalars
) -> None:
    """Load what `gather_state` returned, under any strategy and number of processes.

    Raises:
        CheckpointError: parameters that have one step count together here have different ones in the checkpoint.
    """
    inner = inner_optimizer(optimizer)
    keys = list(dict.fromkeys(name.partition("/")[0] for name in tensors))
    for name, shard in shards(parameters, optimizer).items():
        for key in keys:
            if (tensor := tensors.get(f"{key}/{name}")) is not None:
                _restore_tensor(inner, shard, key, tensor)
        for key, values in scalars.items():
            if name in values:
                _restore_scalar(inner, shard.holder, key, values[name], name)


def _restore_tensor(optimizer: Optimizer, shard: Shard, key: str, tensor: Tensor) -> None:
    if key == MODEL:
        shard.fill(shard.holder.data, tensor)
        return
    kept = optimizer.state[shard.holder]
    if tensor.numel() != shard.shape.numel():  # such as the block maxima of 8-bit Adam
        kept[key] = tensor.to(shard.holder.device)
        return
    if key not in kept:
        dtype = shard.holder.dtype if tensor.is_floating_point() else tensor.dtype
        kept[key] = torch.zeros_like(shard.holder, dtype=dtype, requires_grad=False)
    shard.fill(kept[key], tensor)


def _restore_scalar(optimizer: Optimizer, holder: Tensor, key: str, number: float, name: str) -> None:
    kept = optimizer.state[holder]
    if key in kept and float(kept[key]) != number:
        raise CheckpointError(
            name, f"its {key} differs from its group's", found=number, expected=float(kept[key]),
            hint="Resume with the --strategy that the checkpoint was made with.",
        )  # fmt: skip
    if not type(optimizer).__module__.startswith("torch."):
        kept[key] = number
        return
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    kept[key] = torch.tensor(float(number), device=holder.device if on_device else "cpu")
