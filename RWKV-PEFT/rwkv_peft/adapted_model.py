"""Base model + adapter = what trains, generates and merges: the one place that puts them together.

The order matters: build, load the base strictly, inject and initialise from the full weights (or load the adapter),
mark what trains, quantise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.base_model import fingerprint, load_base, shape_of, time_states
from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.model.init import add_time_state, model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.adapter_file import (
    AdapterInfo,
    check_same_base,
    load_trained,
    read_adapter,
    read_pth_adapter,
)
from rwkv_peft.peft.injection import (
    STORED,
    adapter_parameters,
    derive_bases,
    inject,
    mark_trainable,
    train_only,
)
from rwkv_peft.peft.quantization import quantise_base
from rwkv_peft.peft.registry import canonical

MEANING = ("mode", "r", "rank_pattern", "alpha", "rslora", "gamma", "g", "tokens")
"""The options that decide what an adapter's tensors mean."""


@dataclass(frozen=True)
class Start:
    """An adapter to go on from."""

    path: str
    tensors: Mapping[str, Tensor]
    tokenizer: Mapping[str, Any] | None
    """Identity of its data's tokenizer, where it knows."""


def make_trainable(
    model: RWKV6,
    peft: PeftConfig,
    train_type: str,
    *,
    start: Start | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Add what `--train_type` and `--peft` train, and mark it, in place; the names of layers with an adapter."""
    if train_type == "state":
        tune_state(model, peft, start)
        return []
    return add_adapter(model, peft, start=start, gradients=gradients)


def add_adapter(
    model: RWKV6, peft: PeftConfig, *, start: Start | None = None, gradients: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Put the method onto the model and mark what trains, in place; the names of the layers that carry an adapter.

    Args:
        model: with its base loaded (or on meta, where nothing is initialised).
        peft: the method.
        start: take the trained values from there.
        gradients: see peft.inject.
    """
    method, _ = canonical(peft.peft, peft.peft_config)
    targets = inject(model, peft, gradients=gradients, initialise=start is None)
    mark_trainable(model, method, peft.train_parts, STORED[peft.adapter_dtype])
    if start is not None:
        load_trained(model, start.tensors, start.path)
        derive_bases(model)
    quantise_base(model, peft.quant)
    return targets


def tune_state(model: RWKV6, peft: PeftConfig, start: Start | None = None) -> None:
    """Let the state that texts begin with train, from zeros or from the base's own, and freeze the rest; in place.

    Args:
        peft: the dtype of what trains, and how the base is held.
        start: take the state from there.
    """
    add_time_state(model)
    train_only(model, time_states(dict(model.named_parameters())).keys(), STORED[peft.adapter_dtype])
    if start is not None:
        load_trained(model, start.tensors, start.path)
    quantise_base(model, peft.quant)


def warm_start(peft: PeftConfig, base_fingerprint: Mapping[str, Any], base: str) -> Start:
    """Read the adapter named by the method's `load` option; a `.pth` of RWKV-PEFT does not say what it is.

    Raises:
        CheckpointError: another method, other options, or another base than the adapter's.
    """
    path = peft.peft_config["load"]
    if path.endswith(".pth"):
        if peft.peft_config.get("mode", "row") != "row":
            raise CheckpointError(path, "RWKV-PEFT's .pth adapters are Bone row", found=peft.peft_config["mode"])
        return Start(path, read_pth_adapter(path), None)
    tensors, info = read_adapter(path)
    check_same_base(info, base_fingerprint, path, base)
    ours, theirs = peft.peft_config, info.options
    options = [(name, ours.get(name), theirs.get(name)) for name in MEANING]
    for name, found, expected in (("method", peft.peft, info.method), *options):
        if found != expected:
            raise CheckpointError(path, f"has {name} {expected}, this run {found}", hint="Make them the same.")
    return Start(path, tensors, info.tokenizer)


@dataclass(frozen=True)
class Loaded:
    """A base, an adapter, and the model of both."""

    model: RWKV6
    base: dict[str, Tensor]
    """The base file's tensors, in file order."""
    trained: dict[str, Tensor]
    """The adapter file's tensors."""
    info: AdapterInfo


def load_with_adapter(
    base_model: str | Path,
    adapter: str | Path,
    *,
    dtype: torch.dtype | None = None,
    as_trained: bool = False,
    says: PeftConfig | None = None,
) -> Loaded:
    """The model that was trained: everything but the base is read from the adapter file.

    Args:
        base_model: `.pth` the adapter was trained on.
        adapter: `.safetensors` of a run, or a `.pth` of RWKV-PEFT.
        dtype: of the activations and the large matrices; None keeps the base's.
        as_trained: hold the base as it was held while it trained: in that dtype, quantised if it was.
        says: the method of a `.pth`, which does not say it.
    Raises:
        CheckpointError: a damaged file, or another base.
    """
    base = load_base(base_model)
    if says is None:
        trained, info = read_adapter(adapter)
        check_same_base(info, fingerprint(base), adapter, base_model)
    else:
        trained, info = _described(read_pth_adapter(adapter), says, base)
    dtype = getattr(torch, info.dtype) if as_trained else dtype or base["emb.weight"].dtype
    model = model_from_state(shape_of(base, base_model), base, base_model, dtype=dtype)
    peft = PeftConfig(peft=info.method, peft_config=info.options, peft_targets=tuple(info.targets))
    try:
        inject(model, peft, initialise=False)
    except ConfigError as error:  # not the user's flags: what the file says
        raise CheckpointError(str(adapter), f"damaged description ({error})") from error
    base_parts = {name for name in trained if name in base}
    train_only(model, adapter_parameters(model) | base_parts, torch.float32)
    load_trained(model, trained, adapter)
    derive_bases(model)
    if as_trained:
        quantise_base(model, info.quant)
    return Loaded(model.eval(), base, trained, info)


def _described(
    tensors: dict[str, Tensor], says: PeftConfig, base: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], AdapterInfo]:
    """A `.pth` adapter's tensors with the description that flags give of it."""
    method, options = canonical(says.peft, says.peft_config)
    layers = {name.rpartition(".")[0] for name in tensors if name not in base and "." in name}
    info = AdapterInfo(method=method, options=options, targets=sorted(layers), fingerprint=fingerprint(base))
    return tensors, info


def load_plain(model: str | Path, *, dtype: torch.dtype | None = None) -> RWKV6:
    """A model without an adapter: a base, or the result of a merge."""
    state = load_base(model)
    return model_from_state(shape_of(state, model), state, model, dtype=dtype or state["emb.weight"].dtype).eval()
