"""What trains and the optimizer's state of it, whole and by name, whatever the strategy keeps of it where.

Outside of ZeRO a process has all of a parameter, and the optimizer's state is kept by the parameter itself. Under ZeRO
a process has a share of a group's parameters, as fp32 numbers in one long tensor, which the state is kept by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.errors import CheckpointError

MASTER = "model"
"""What comes before the name of a parameter's values, as the optimizer holds them, where a state has its key."""

Scalars = dict[str, dict[str, int | float]]
"""A state's numbers that are no tensors of a parameter's size (`step`), by key and the parameter's name."""


@dataclass(frozen=True)
class Share:
    """Where this process keeps its part of one parameter."""

    holder: Tensor
    """Holds the values; the optimizer's state is kept by it."""
    at: int
    """First number of the part in the holder."""
    start: int
    """First number of the part in the parameter."""
    count: int
    """Numbers of the part; 0 where this process has none."""
    shape: torch.Size
    """Of the whole parameter."""
    whole: bool
    """Whether the holder is the parameter."""


def collect(parameters: Mapping[str, nn.Parameter], optimizer: Any, *, keep: bool) -> tuple[dict[str, Tensor], Scalars]:
    """Copies on the CPU of `model/NAME`, `exp_avg/NAME` and so on, and the state's numbers.

    Under ZeRO all processes must call this together.

    Args:
        parameters: what trains, by name.
        optimizer: torch's, or DeepSpeed's around it.
        keep: whether this process wants the tensors; the others get none.
    Raises:
        CheckpointError: an optimizer whose state cannot be put together from shares.
    """
    tensors: dict[str, Tensor] = {}
    scalars: Scalars = {}
    state = _inner(optimizer).state
    for name, share in _shares(parameters, optimizer).items():
        found = {MASTER: share.holder, **state.get(share.holder, {})}
        for key, value in found.items():
            if not isinstance(value, Tensor) or value.ndim == 0 < share.holder.ndim:
                scalars.setdefault(key, {})[name] = value.item() if isinstance(value, Tensor) else value
            elif share.whole:
                tensors |= {f"{key}/{name}": value.detach().to("cpu", copy=True)} if keep else {}
            elif value.shape == share.holder.shape:
                joined = _joined(value.detach(), share)
                tensors |= {f"{key}/{name}": joined.cpu()} if keep else {}
            else:
                raise CheckpointError(name, f"the optimizer's {key} is not of the parameter's size; it cannot be saved")
    return tensors, scalars


def _joined(values: Tensor, share: Share) -> Tensor:
    """A parameter from the processes' shares of it, on the first process."""
    whole = torch.zeros(share.shape.numel(), dtype=values.dtype, device=values.device)
    whole[share.start : share.start + share.count] = values[share.at : share.at + share.count]
    torch.distributed.reduce(whole, dst=0)
    return whole.view(share.shape)


@torch.no_grad()
def put_back(
    parameters: Mapping[str, nn.Parameter], optimizer: Any, tensors: Mapping[str, Tensor], scalars: Scalars
) -> None:
    """Give the optimizer what `collect` made of one, of any strategy and number of processes.

    Raises:
        CheckpointError: parameters that share one count of steps here have different ones.
    """
    inner = _inner(optimizer)
    keys = list(dict.fromkeys(key for key, _, _ in (name.partition("/") for name in tensors)))
    for name, share in _shares(parameters, optimizer).items():
        for key in keys:
            tensor = tensors.get(f"{key}/{name}")
            if tensor is not None and key == MASTER:
                _fill(share.holder.data, tensor, share)
            elif tensor is not None and tensor.numel() != share.shape.numel():
                inner.state[share.holder][key] = tensor.to(share.holder.device)
            elif tensor is not None:
                kept = inner.state[share.holder]
                if key not in kept:
                    dtype = share.holder.dtype if tensor.is_floating_point() else tensor.dtype
                    kept[key] = torch.zeros_like(share.holder, dtype=dtype, requires_grad=False)
                _fill(kept[key], tensor, share)
        for key, values in scalars.items():
            if name in values:
                _set_number(inner, share.holder, key, values[name], name)


def _fill(values: Tensor, tensor: Tensor, share: Share) -> None:
    """Copy this process's part of a whole tensor into what holds it."""
    if share.whole:
        values.copy_(tensor.view(share.shape))
        return
    part = tensor.reshape(-1)[share.start : share.start + share.count]
    values[share.at : share.at + share.count].copy_(part)


def _set_number(optimizer: Optimizer, holder: Tensor, key: str, number: float, name: str) -> None:
    kept = optimizer.state[holder]
    if key in kept and float(kept[key]) != number:
        raise CheckpointError(
            name, f"has another {key} than its group", found=number, expected=float(kept[key]),
            hint="Resume with the --strategy that the checkpoint was made with.",
        )  # fmt: skip
    if not type(optimizer).__module__.startswith("torch."):
        kept[key] = number
        return
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    kept[key] = torch.tensor(float(number), device=holder.device if on_device else "cpu")


def _inner(optimizer: Any) -> Optimizer:
    """torch's optimizer within DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def _shares(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, Share]:
    """Each parameter's share on this process. DeepSpeed's own accessors lose track where LISA drops moments."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return {name: _share_of_stage_3(parameter, optimizer) for name, parameter in parameters.items()}
    if not hasattr(optimizer, "single_partition_of_fp32_groups"):
        return {name: Share(p, 0, 0, p.numel(), p.shape, True) for name, p in parameters.items()}
    groups = {id(p): number for number, group in enumerate(optimizer.bit16_groups) for p in group}
    return {
        name: _share_of_stage_2(p, optimizer.single_partition_of_fp32_groups[groups[id(p)]])
        for name, p in parameters.items()
    }


def _share_of_stage_2(parameter: nn.Parameter, holder: Tensor) -> Share:
    """Stages 1 and 2: a process has a stretch of all of a group's parameters one after another."""
    place = parameter._hp_mapping
    if place is None:
        return Share(holder, 0, 0, 0, parameter.shape, False)
    high, low = place.hp_fragment_address, place.lp_fragment_address
    return Share(holder, high.start, low.start, high.numel, parameter.shape, False)


def _share_of_stage_3(parameter: nn.Parameter, optimizer: Any) -> Share:
    """Stage 3: a process has an equal part of every parameter, the last one perhaps less."""
    group, at, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * count
    count = max(0, min(count, parameter.ds_numel - start))
    return Share(optimizer.fp32_partitioned_groups_flat[group], at, start, count, parameter.ds_shape, False)
