"""Put a method onto a model, and say which parameters train."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.methods.prompt import PROMPT_NAME
from rwkv_peft.peft.registry import canonical, method_config, method_of

TARGET_SPELLINGS = {"att": "att.*", "ffn": "ffn.*"}
"""Short names of `--peft_targets`: the linear layers of time-mix and of channel-mix."""

PART_SPELLINGS = {"time": "time_*", "ln": "ln*"}
"""RWKV-PEFT's short names of `--train_parts`."""

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What `--adapter_dtype` means."""


def inject(
    model: nn.Module,
    config: PeftConfig,
    *,
    gradients: Mapping[str, Tensor] | None = None,
    initialise: bool = True,
) -> list[str]:
    """Put the method's layers in place of the targeted ones, in place, and freeze everything but what it adds.

    A target pattern is a glob over a layer's qualified name or its last segments: `key` is every `*.key`, `att.*`
    every layer of every `att`, `*` every linear layer. An embedding is taken only by its name, without a wildcard.
    Subclasses of either with a forward of their own are no targets, unless they have a true `plain_product`.

    Args:
        model: any module; its weights must be loaded, since methods may initialise from them.
        config: method, its options and targets, and the dtype of what trains.
        gradients: of the targets' weights, by layer name, for a method that starts from them.
        initialise: False leaves what trains to be loaded; call `derive_bases` then.
    Returns:
        The names of the layers that carry an adapter.
    Raises:
        ConfigError: a pattern matched nothing, or a shape does not fit the method.
    """
    name, options = canonical(config.peft, config.peft_config)
    method, options, dtype = method_of(name), method_config(name, options), STORED[config.adapter_dtype]
    chosen: dict[str, PeftLinear] = {}
    if method.layer is not None:
        chosen = _choose(model, method.layer, options, config.peft_targets or method.layer.default_targets, dtype)
    for target, layer in chosen.items() if initialise else ():
        if not layer.weight.is_meta:
            layer.initialise(gradients.get(target) if gradients else None)
    for target, layer in chosen.items():
        parent, _, child = target.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    if method.add is not None:
        method.add(model, options, dtype, initialise)
    if not method.trains_base:
        train_only(model, adapter_parameters(model), dtype)
    if initialise:
        derive_bases(model)
    return list(chosen)


def targeted(model: nn.Module, config: PeftConfig) -> list[str]:
    """The names of the layers that `inject` would replace."""
    layer = method_of(canonical(config.peft, config.peft_config)[0]).layer
    return _match("peft_targets", config.peft_targets or layer.default_targets, *_candidates(model))


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, nn.Embedding]]:
    """The linear layers and the embeddings of a model by name."""
    named = dict(model.named_modules())
    return tuple({name: m for name, m in named.items() if _is_plain(m, kind)} for kind in (nn.Linear, nn.Embedding))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer of this kind can be replaced.

    A subclass with a forward of its own may do more than the product, unless it has a true `plain_product`; and
    nn.MultiheadAttention reads the weight of its `out_proj` without calling it, so an adapter would have no effect.
    """
    if not isinstance(module, kind) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is kind.forward or getattr(module, "plain_product", False)


def _choose(
    model: nn.Module, layer: type[PeftLinear], options: Any, targets: Sequence[str], dtype: torch.dtype
) -> dict[str, PeftLinear]:
    """New layers by the name of the layer they will replace; every shape is checked before any is replaced."""
    linears, embeddings = _candidates(model)
    names = _match("peft_targets", targets, linears, embeddings)
    configs = dict.fromkeys(names, options)
    for pattern, r in options.rank_pattern.items():
        for name in _match(f"{options.flag} rank_pattern", [pattern], linears, embeddings):
            if name in configs:
                configs[name] = replace(options, r=r)
    modules = linears | embeddings
    for name, config in configs.items():
        layer.check_shape(name, tuple(modules[name].weight.shape), config)
        if name in embeddings and not layer.has_rows(config):
            raise ConfigError("peft_targets", name, what="is an embedding, which this method (or mode) cannot go onto")
    return {name: layer(modules[name], config, dtype) for name, config in configs.items()}


def _match(
    flag: str, patterns: Sequence[str], linears: Mapping[str, nn.Module], embeddings: Mapping[str, nn.Module]
) -> list[str]:
    """The names that any pattern matches, in the model's order."""
    chosen: set[str] = set()
    for pattern in patterns:
        glob = TARGET_SPELLINGS.get(pattern, pattern)
        candidates = linears if set(glob) & set("*?[") else [*linears, *embeddings]
        matched = [name for name in candidates if fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")]
        if not matched:
            near = ", ".join(_near(pattern, [*linears, *embeddings]))
            raise ConfigError(flag, pattern, what="matches no linear layer", hint=f"Near names: {near}.")
        chosen |= set(matched)
    return [name for name in [*embeddings, *linears] if name in chosen]


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """The names most like a pattern; one without a `*` is compared with as many last segments as it has."""
    segments = 0 if "*" in pattern else pattern.count(".") + 1
    endings = list(dict.fromkeys(".".join(name.split(".")[-segments:]) for name in names))
    return difflib.get_close_matches(pattern, endings, n=3, cutoff=0.3) or endings[:3]


def derive_bases(model: nn.Module) -> None:
    """Where a method wants another frozen weight than the base's, make it, from the initial factors."""
    for layer in peft_layers(model).values():
        if not layer.weight.is_meta:
            layer.derive_base()


def mark_trainable(
    model: nn.Module, method: str, train_parts: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze everything but the adapters and `train_parts`, and keep what trains in `dtype`.

    A part is a glob over one whole segment of a parameter's name; `time` means `time_*`, `ln` means `ln*`.
    A method that trains the base trains all of it, unless there are parts.

    Returns:
        The names of the trained parameters.
    Raises:
        ConfigError: a part that names no parameter, or the weight below an adapter.
    """
    adapters = adapter_parameters(model)
    base = [name for name, _ in model.named_parameters() if name not in adapters]
    full = method_of(method).trains_base and not train_parts
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
    names = {f"{name}.{parameter}" for name, layer in peft_layers(model).items() for parameter in layer.adapter_names}
    return names | ({PROMPT_NAME} if getattr(model, PROMPT_NAME, None) is not None else set())


def initial_factors(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that an adapter file keeps beside what trains, by qualified name."""
    layers = peft_layers(model).items()
    return {f"{name}.{buffer}": getattr(layer, buffer) for name, layer in layers for buffer in layer.initial_names}


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Multipliers of the learning rate by qualified name, where a method has any."""
    layers = peft_layers(model).items()
    return {f"{name}.{key}": scale for name, layer in layers for key, scale in layer.lr_scales().items() if scale != 1}


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
