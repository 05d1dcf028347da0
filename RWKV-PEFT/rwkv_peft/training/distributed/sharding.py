"""Locates and gathers parameters and optimizer state under each strategy.

Without ZeRO, every process has each parameter as a whole, and the parameter is the key of its optimizer state. Under
ZeRO, a process has a part of the fp32 master weights, in flat tensors, and these tensors are the keys of the optimizer
state. In stages 1 and 2, the part is one contiguous range of all parameters of a group. In stage 3, it is a part of
every parameter. DeepSpeed stores the positions of these parts in private attributes of its optimizers and parameters.
Only this file and deepspeed_strategy.py use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this process keeps."""

    holder: Tensor
    """The tensor with the values; it is the key of the optimizer's state. 1-D under ZeRO."""
    offset: int
    """Index of the shard's first element in the holder."""
    start: int
    """Index of the shard's first element in the flattened parameter."""
    count: int
    """Number of elements; 0 if this process has none of the parameter."""
    shape: torch.Size
    """Shape of the whole parameter."""
    is_whole: bool
    """Whether the holder is the parameter itself."""

    def gather(self, values: Tensor) -> Tensor:
        """Gather a full tensor of the parameter's shape on process 0, from the `values` of all processes.

        Each process's `values` have the shape of its holder. Under ZeRO, all processes must call this together. The
        result is complete on process 0 only.
        """
        if self.is_whole:
            return values.detach()
        whole = torch.zeros(self.shape.numel(), dtype=values.dtype, device=values.device)
        whole[self.start : self.start + self.count] = values.detach()[self.offset : self.offset + self.count]
        dist.reduce(whole, dst=0)
        return whole.view(self.shape)

    def fill(self, values: Tensor, whole: Tensor) -> None:
        """Copy this process's part of a whole tensor into `values` (shaped as the holder), in place."""
        if self.is_whole:
            values.copy_(whole.view(self.shape))
            return
        part = whole.reshape(-1)[self.start : self.start + self.count]
        values[self.offset : self.offset + self.count].copy_(part)


def inner_optimizer(optimizer: Any) -> Optimizer:
    """Return torch's optimizer, which DeepSpeed's optimizers wrap."""
    return getattr(optimizer, "optimizer", optimizer)


def shards(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, Shard]:
    """Return this process's shard of each parameter, by name.

    DeepSpeed has accessors for this, but they fail once LISA has dropped the moments of frozen blocks.

    Args:
        parameters: trainable parameters by name.
        optimizer: torch's, or DeepSpeed's around it.
    """
    if _is_zero_3(optimizer):
        return {name: _shard_of_stage_3(parameter, optimizer) for name, parameter in parameters.items()}
    if not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return {name: Shard(p, 0, 0, p.numel(), p.shape, True) for name, p in parameters.items()}
    groups = {id(p): number for number, group in enumerate(optimizer.bit16_groups) for p in group}
    return {
        name: _shard_of_stage_2(p, optimizer.single_partition_of_fp32_groups[groups[id(p)]])
        for name, p in parameters.items()
    }


def moment_holders(optimizer: Any, group: int) -> list[Tensor]:
    """Return the tensors that are the keys of a parameter group's moments in the optimizer's state."""
    if not _is_zero_3(optimizer):
        return optimizer.param_groups[group]["params"]
    # ZeRO-3 fills its parameter groups only during a step.
    flat = optimizer.fp32_partitioned_groups_flat
    return [part for index, part in enumerate(flat) if optimizer.sub_group_to_group_id[index] == group]


def gather_parameters(parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather full tensors by name under any sharding strategy, on the CPU.

    Under ZeRO-3 all processes must call this together, with the same names in the same order.

    Args:
        parameters: the parameters themselves; a detached tensor of a sharded parameter would be empty.
        keep: whether this process wants the result; others get an empty dict.
    """
    gathered = {}
    for name, tensor in parameters.items():
        with _gathered(tensor):
            if keep:
                gathered[name] = tensor.detach().cpu()
    return gathered


def forward_passes_needed(count: int, model: nn.Module, device: torch.device) -> int:
    """Return how often this process must run the model, if its own rows need `count` forward passes.

    Under ZeRO-3, all processes gather each weight together. So all of them must run the model as often as the process
    that needs the most forward passes. Otherwise the result is `count`.
    """
    if not any(_is_sharded(parameter) for parameter in model.parameters()):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _is_zero_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def _gathered(tensor: Tensor) -> AbstractContextManager:
    """A context in which a parameter that ZeRO-3 shards is whole."""
    if not _is_sharded(tensor):
        return nullcontext()
    import deepspeed  # not at the top: it takes seconds, and most runs do not need it

    return deepspeed.zero.GatheredParameters(tensor)


def _shard_of_stage_2(parameter: nn.Parameter, holder: Tensor) -> Shard:
    """Stages 1 and 2: a process has one contiguous range of all parameters of a group."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return Shard(holder, 0, 0, 0, parameter.shape, False)
    high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Shard(holder, high.start, low.start, high.numel, parameter.shape, False)


def _shard_of_stage_3(parameter: nn.Parameter, optimizer: Any) -> Shard:
    """Stage 3: a process has an equal part of every parameter; the last part may be shorter."""
    group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * count
    count = max(0, min(count, parameter.ds_numel - start))
    return Shard(optimizer.fp32_partitioned_groups_flat[group], offset, start, count, parameter.ds_shape, False)
