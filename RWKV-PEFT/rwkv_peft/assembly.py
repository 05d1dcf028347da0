"""Base model + adapter = what trains, generates and merges: the one place that puts them together.

The order matters: build, load the base strictly, inject and initialise from the full weights, mark what trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.checkpoint import fingerprint, load_base, shape_of
from rwkv_peft.config import PeftConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.model.init import model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.adapter_io import (
    AdapterInfo,
    check_same_base,
    load_trained,
    read_adapter,
    read_pth_adapter,
)
from rwkv_peft.peft.inject import adapter_parameters, inject, mark_trainable, train_only
from rwkv_peft.peft.registry import layer_class, method_config


def add_adapter(model: RWKV6, peft: PeftConfig) -> list[str]:
    """Inject the method's layers and mark what trains, in place; the names of the layers that carry an adapter."""
    dtype = torch.float32 if peft.adapter_dtype == "fp32" else torch.bfloat16
    options = method_config(peft.peft, peft.peft_config)
    targets = inject(model, peft.peft, options, dtype=dtype) if layer_class(peft.peft) else []
    mark_trainable(model, peft.peft, peft.train_parts, dtype)
    return targets


def warm_start(model: RWKV6, peft: PeftConfig, base_fingerprint: Mapping[str, Any], base: str) -> AdapterInfo | None:
    """Load the adapter named by the method's `load` option; its description, None for a `.pth` of RWKV-PEFT.

    Raises:
        CheckpointError: another method, other options, or another base than the adapter's.
    """
    path = peft.peft_config["load"]
    if path.endswith(".pth"):
        if peft.peft_config.get("mode", "row") != "row":
            raise CheckpointError(path, "RWKV-PEFT's .pth adapters are Bone row", found=peft.peft_config["mode"])
        load_trained(model, read_pth_adapter(path), path)
        return None
    tensors, info = read_adapter(path)
    check_same_base(info, base_fingerprint, path, base)
    for name, found, expected in (("method", peft.peft, info.method), *_layout(peft.peft_config, info.options)):
        if found != expected:
            raise CheckpointError(path, f"has {name} {expected}, this run {found}", hint="Make them the same.")
    load_trained(model, tensors, path)
    return info


def _layout(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The options that decide what a tensor means, of a run and of an adapter."""
    return [(name, ours.get(name), theirs.get(name)) for name in ("mode", "r", "alpha")]


@dataclass(frozen=True)
class Loaded:
    """A base, an adapter, and the model of both."""

    model: RWKV6
    base: dict[str, Tensor]
    """The base file's tensors, in file order."""
    trained: dict[str, Tensor]
    """The adapter file's tensors."""
    info: AdapterInfo


def load_with_adapter(base_model: str | Path, adapter: str | Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """The model that was trained: everything but the base is read from the adapter file.

    Args:
        base_model: `.pth` the adapter was trained on.
        adapter: `.safetensors` of a run.
        dtype: of the activations and the large matrices; None keeps the base's.
    Raises:
        CheckpointError: a damaged file, or another base.
    """
    base = load_base(base_model)
    trained, info = read_adapter(adapter)
    check_same_base(info, fingerprint(base), adapter, base_model)
    model = model_from_state(shape_of(base, base_model), base, base_model, dtype=dtype or base["emb.weight"].dtype)
    try:
        inject(model, info.method, method_config(info.method, info.options), targets=info.targets)
    except ConfigError as error:  # not the user's flags: what the file says
        raise CheckpointError(str(adapter), f"damaged description ({error})") from error
    base_parts = {name for name in trained if name in base}
    train_only(model, adapter_parameters(model) | base_parts, torch.float32)
    load_trained(model, trained, adapter)
    return Loaded(model.eval(), base, trained, info)


def load_plain(model: str | Path, *, dtype: torch.dtype | None = None) -> RWKV6:
    """A model without an adapter: a base, or the result of a merge."""
    state = load_base(model)
    return model_from_state(shape_of(state, model), state, model, dtype=dtype or state["emb.weight"].dtype).eval()
