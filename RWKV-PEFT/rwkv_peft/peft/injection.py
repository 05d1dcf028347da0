"""Inject a method's layers into a model, and select the trainable parameters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rwkv_peft.config.method import MethodConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.methods.prompt import PROMPT_NAME
from rwkv_peft.peft.registry import method_of

TARGET_SPELLINGS = {"att": "att.*", "ffn": "ffn.*"}
"""Short names in `--peft_targets`: the linear layers of time-mix and of channel-mix."""

PART_SPELLINGS = {"time": "time_*", "ln": "ln*"}
"""RWKV-PEFT's short names in `--train_parts`."""

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of each value of `--adapter_dtype`."""


def inject(
    model: nn.Module,
    method: MethodConfig,
    targets: Sequence[str] = (),
    *,
    adapter_dtype: torch.dtype = torch.float32,
    gradients: Mapping[str, Tensor] | None = None,
    initialize: bool = True,
) -> list[str]:
    """Replace the targeted layers by the method's layers, in place, and freeze everything except what it adds.

    A target pattern is a glob over a layer's qualified name or its last segments: `key` is every `*.key`, `att.*`
    every layer of every `att`, `*` every linear layer. Embeddings are matched by their name only, not by wildcards.
    Subclasses of nn.Linear and nn.Embedding with their own forward are not targets, unless `plain_product` is true.

    Example:
        >>> layers = rwkv_peft.inject(model, BoneConfig(r=64), targets=("q_proj", "v_proj"))

    Args:
        model: any module. Its weights must be loaded, because methods may initialize from them.
        method: the method's options, such as `BoneConfig(r=64)`.
        targets: patterns; the method's default targets if empty.
        adapter_dtype: dtype of the trainable parameters.
        gradients: gradients of the targets' weights by layer name, for a method that starts from them.
        initialize: False if the trainable parameters will be loaded; call `derive_bases` after that.
    Returns:
        The names of the layers with an adapter.
    Raises:
        ConfigError: a pattern matches nothing, or the method does not fit a layer's shape.
    """
    kind = method_of(method)
    chosen: dict[str, PeftLinear] = {}
    if kind.layer is not None:
        chosen = _choose(model, kind.layer, method, targets or kind.layer.default_targets, adapter_dtype)
    for target, layer in chosen.items() if initialize else ():
        if not layer.weight.is_meta:
            layer.initialize(gradients.get(target) if gradients else None)
    for target, layer in chosen.items():
        parent, _, child = target.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    if kind.add is not None:
        kind.add(model, method, adapter_dtype, initialize)
    if not method.trains_base:
        train_only(model, adapter_parameters(model), adapter_dtype)
    if initialize:
        derive_bases(model)
    return list(chosen)


def targeted(model: nn.Module, method: MethodConfig, targets: Sequence[str] = ()) -> list[str]:
    """Return the names of the layers that `inject` would replace."""
    layer = method_of(method).layer
    return _match("peft_targets", targets or layer.default_targets, *_candidates(model))


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, nn.Embedding]]:
    """Return the linear layers and the embeddings of a model, by name."""
    named = dict(model.named_modules())
    return tuple({name: m for name, m in named.items() if _is_plain(m, kind)} for kind in (nn.Linear, nn.Embedding))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is a layer of this kind that can be replaced.

    A subclass with its own forward may do more than the product, unless its `plain_product` is true. An adapter on the
    `out_proj` of nn.MultiheadAttention would have no effect, because its weight is read without calling the layer.
    """
    if not isinstance(module, kind) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is kind.forward or getattr(module, "plain_product", False)


def _choose(
    model: nn.Module, layer: type[PeftLinear], options: MethodConfig, targets: Sequence[str], dtype: torch.dtype
) -> dict[str, PeftLinear]:
    """Return new layers by the name of the layer they replace. All shapes are checked before any layer is replaced."""
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
        if name in embeddings and not layer.supports_embedding(config):
            raise ConfigError("peft_targets", name, what="is an embedding, which this method or mode does not support")
    return {name: layer(modules[name], config, dtype) for name, config in configs.items()}


def _match(
    flag: str, patterns: Sequence[str], linears: Mapping[str, nn.Module], embeddings: Mapping[str, nn.Module]
) -> list[str]:
    """Return the names that any pattern matches, in the model's order."""
    chosen: set[str] = set()
    for pattern in patterns:
        glob = TARGET_SPELLINGS.get(pattern, pattern)
        candidates = linears if set(glob) & set("*?[") else [*linears, *embeddings]
        matched = [name for name in candidates if fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")]
        if not matched:
            near = ", ".join(_near(pattern, [*linears, *embeddings]))
            raise ConfigError(flag, pattern, what="matches no linear layer", hint=f"Similar names: {near}.")
        chosen |= set(matched)
    return [name for name in [*embeddings, *linears] if name in chosen]


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names most similar to a pattern. Without a `*`, it is compared with the same number of segments."""
    segments = 0 if "*" in pattern else pattern.count(".") + 1
    endings = list(dict.fromkeys(".".join(name.split(".")[-segments:]) for name in names))
    return difflib.get_close_matches(pattern, endings, n=3, cutoff=0.3) or endings[:3]


def derive_bases(model: nn.Module) -> None:
    """Replace frozen weights by their residual, in layers of methods that use one."""
    for layer in peft_layers(model).values():
        if not layer.weight.is_meta:
            layer.derive_base()


def mark_trainable(
    model: nn.Module, method: MethodConfig, train_parts: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze everything except the adapters and `train_parts`, and store the trainable parameters in `dtype`.

    A part is a glob over one whole segment of a parameter's name; `time` means `time_*`, `ln` means `ln*`.
    A method with `trains_base` trains the whole base, or only `train_parts` if there are any.

    Returns:
        The names of the trainable parameters.
    Raises:
        ConfigError: a part matches no parameter, or the weight of a layer with an adapter.
    """
    adapters = adapter_parameters(model)
    base = [name for name, _ in model.named_parameters() if name not in adapters]
    full = method.trains_base and not train_parts
    parts = set(base) if full else _parts(train_parts, base)
    carrying = sorted(parts & {f"{name}.weight" for name in peft_layers(model)})
    if carrying:
        what = f"matches {carrying[0]}, which has an adapter and must stay frozen"
        raise ConfigError("train_parts", what=what, hint="Use other parts, or --peft none.")
    trained = adapters | parts
    train_only(model, trained, dtype)
    return [name for name, _ in model.named_parameters() if name in trained]


def train_only(model: nn.Module, names: Set[str], dtype: torch.dtype) -> None:
    """Make `names` the trainable parameters, stored in `dtype`, and freeze all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.to(dtype)


def adapter_parameters(model: nn.Module) -> set[str]:
    """Return the qualified names of the parameters that a method added."""
    names = {f"{name}.{parameter}" for name, layer in peft_layers(model).items() for parameter in layer.adapter_names}
    return names | ({PROMPT_NAME} if getattr(model, PROMPT_NAME, None) is not None else set())


def initial_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that an adapter file stores in addition to the trainable parameters, by qualified name."""
    layers = peft_layers(model).items()
    return {f"{name}.{buffer}": getattr(layer, buffer) for name, layer in layers for buffer in layer.initial_names}


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Return the learning rate multipliers that differ from 1, by qualified name."""
    layers = peft_layers(model).items()
    return {f"{name}.{key}": scale for name, layer in layers for key, scale in layer.lr_scales().items() if scale != 1}


def _parts(parts: Sequence[str], names: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for part in parts:
        pattern = PART_SPELLINGS.get(part, part)
        matched = [name for name in names if any(fnmatchcase(segment, pattern) for segment in name.split("."))]
        if not matched:
            segments = sorted({segment for name in names for segment in name.split(".") if not segment.isdigit()})
            raise ConfigError(
                "train_parts", part, what="matches no parameter", expected=f"one of {', '.join(segments)}"
            )
        chosen |= set(matched)
    return chosen


def peft_layers(model: nn.Module) -> dict[str, PeftLinear]:
    """Return the injected layers by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PeftLinear)}
