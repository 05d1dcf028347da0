"""Put a method's layers in place of `nn.Linear`, and say which parameters train."""

from __future__ import annotations

import difflib
from collections.abc import Sequence, Set
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.registry import layer_class

RWKV_TARGETS = ("blocks.*.att.*", "blocks.*.ffn.*")
"""Every linear layer of time-mix and channel-mix."""

PART_SPELLINGS = {"time": "time_*", "ln": "ln*"}
"""RWKV-PEFT's short names of `--train_parts`."""


def inject(
    model: nn.Module,
    method: str,
    config: Any,
    *,
    targets: Sequence[str] = RWKV_TARGETS,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Replace the linear layers whose qualified names match a target pattern, in place.

    Args:
        model: any module; its weights must be loaded, since methods may initialise from them.
        method: a name in the registry that has a layer.
        config: the method's config.
        targets: glob patterns over qualified names.
        dtype: of the trained parameters.
    Returns:
        The names of the replaced layers.
    Raises:
        ConfigError: a pattern matched nothing, or a shape does not fit the method.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = _match(targets, linears)
    layer = layer_class(method)
    layer.check_shapes({name: tuple(linears[name].weight.shape) for name in chosen}, config)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer(linears[name], config, dtype))
    return chosen


def _match(patterns: Sequence[str], linears: dict[str, nn.Linear]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in linears if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.3)
            raise ConfigError(
                "peft_targets", pattern, what="matches no linear layer", hint=f"Near names: {', '.join(near)}."
            )
        chosen |= set(matched)
    return [name for name in linears if name in chosen]


def mark_trainable(
    model: nn.Module, method: str, train_parts: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze everything but the adapters and `train_parts`, and keep what trains in `dtype`.

    A part is a glob over one whole segment of a parameter's name; `time` means `time_*`, `ln` means `ln*`.
    Method `none` without parts trains everything.

    Returns:
        The names of the trained parameters.
    Raises:
        ConfigError: a part that names no parameter, or the weight below an adapter.
    """
    adapters = adapter_parameters(model)
    base = [name for name, _ in model.named_parameters() if name not in adapters]
    full = method == "none" and not train_parts
    parts = set(base) if full else _parts(train_parts, base)
    carrying = sorted(parts & {f"{name}.weight" for name in peft_layers(model)})
    if carrying:
        what = f"names {carrying[0]}, which carries an adapter and stays frozen"
        raise ConfigError("train_parts", what=what, hint="Name other parts, or use --peft none.")
    trained = adapters | parts
    train_only(model, trained, dtype)
    return [name for name, _ in model.named_parameters() if name in trained]


def train_only(model: nn.Module, names: Set[str], dtype: torch.dtype) -> None:
    """Freeze every parameter but `names`; those train, stored in `dtype`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.to(dtype)


def adapter_parameters(model: nn.Module) -> set[str]:
    """Qualified names of the parameters that methods added."""
    return {f"{name}.{parameter}" for name, layer in peft_layers(model).items() for parameter in layer.adapter_names}


def _parts(parts: Sequence[str], names: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for part in parts:
        pattern = PART_SPELLINGS.get(part, part)
        matched = [name for name in names if any(fnmatchcase(segment, pattern) for segment in name.split("."))]
        if not matched:
            segments = sorted({segment for name in names for segment in name.split(".") if not segment.isdigit()})
            raise ConfigError("train_parts", part, what="names no parameter", expected=f"one of {', '.join(segments)}")
        chosen |= set(matched)
    return chosen


def peft_layers(model: nn.Module) -> dict[str, PeftLinear]:
    """The injected layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PeftLinear)}
