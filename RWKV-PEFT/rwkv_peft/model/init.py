"""Creates a model with RWKV-LM's initial weights, or with the weights of a base model file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_peft.base_model import check_keys, time_states
from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.model.rwkv6 import RWKV6, ChannelMix, TimeMix

ZERO_LINEARS = ("att.output", "ffn.value", "ffn.receptance")
"""Linear layers that are initialized with zeros, so that every block starts as the identity."""
SMALL_LINEARS = ("att.key", "att.gate")
"""Linear layers that are initialized with 0.1 times an orthogonal matrix."""


def model_on_meta(config: ModelConfig, **options) -> RWKV6:
    """Create a model on the meta device: names and shapes only, without memory for weights. Options as for RWKV6."""
    with torch.device("meta"):
        return RWKV6(config, **options)


def model_from_state(config: ModelConfig, state: Mapping[str, Tensor], path: str | Path, **options) -> RWKV6:
    """Create a model that uses the tensors of `state`, copied only if their dtype changes.

    The large matrices are stored in the activations' dtype. Vectors and low-rank factors, which are small, are stored
    in fp32.

    Args:
        config: resolved shape.
        state: the tensors of a base model file.
        path: the file's name, for error messages.
        options: as for RWKV6.
    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    model = model_on_meta(config, **options)
    if time_states(state):
        add_time_state(model)
    check_keys({name: tensor.shape for name, tensor in model.state_dict().items()}, state, path)
    large, wide = large_matrices(model), torch.promote_types(model.dtype, torch.float32)
    converted = {key: tensor.to(model.dtype if key in large else wide) for key, tensor in state.items()}
    model.load_state_dict(converted, strict=True, assign=True)
    return model


def add_time_state(model: RWKV6) -> None:
    """Add an initial WKV state (zeros in fp32) to every block that has none, in place."""
    for block in model.blocks:
        att = block.att
        if att.time_state is None:
            shape = (att.n_head, att.head_size, att.head_size)
            att.time_state = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=att.time_faaaa.device))


def model_from_scratch(config: ModelConfig, seed: int, **options) -> RWKV6:
    """Create a model with RWKV-LM's initial weights in fp32. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    model = model_on_meta(config, **options).to_empty(device="cpu")
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            _init_time_mix(block.att, layer, config, generator)
            _init_channel_mix(block.ffn, layer, config)
        _init_norms(model, config)
        _init_matrices(model, config, generator)
    return model


def large_matrices(model: RWKV6) -> set[str]:
    """Return the names of the weights that `model_from_state` stores in the activations' dtype."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}


def _depth(layer: int, config: ModelConfig) -> tuple[float, float]:
    """Return RWKV-LM's two ratios: one rises from 0 in the first layer to 1 in the last; the other falls from 1."""
    return layer / max(1, config.n_layer - 1), 1.0 - layer / config.n_layer


def _init_time_mix(att: TimeMix, layer: int, config: ModelConfig, generator: torch.Generator) -> None:
    to_one, to_zero = _depth(layer, config)
    channel = torch.arange(config.n_embd).div(config.n_embd).view(1, 1, -1)  # 0 .. 1
    for name, keep in (
        ("x", channel**to_zero),
        ("w", channel**to_zero),
        ("k", channel**to_zero),
        ("v", channel**to_zero + 0.3 * to_one),
        ("r", channel ** (0.5 * to_zero)),
        ("g", channel ** (0.5 * to_zero)),
    ):
        getattr(att, f"time_maa_{name}").copy_(1.0 - keep)
    index = torch.arange(config.dim_att)
    position = index / max(1, config.dim_att - 1)  # 0 .. 1
    att.time_decay.copy_((-6 + 5 * position ** (0.7 + 1.3 * to_one)).view(1, 1, -1))
    zigzag = ((index + 1) % 3 - 1) * 0.1
    att.time_faaaa.copy_((to_one * (1 - position) + zigzag).view_as(att.time_faaaa))
    for factor in (att.time_maa_w1, att.time_decay_w1):
        factor.zero_()
    for factor in (att.time_maa_w2, att.time_decay_w2):
        factor.uniform_(-0.01, 0.01, generator=generator)


def _init_channel_mix(ffn: ChannelMix, layer: int, config: ModelConfig) -> None:
    channel = torch.arange(config.n_embd).div(config.n_embd).view(1, 1, -1)
    keep = channel ** _depth(layer, config)[1]
    ffn.time_maa_k.copy_(1.0 - keep)
    ffn.time_maa_r.copy_(1.0 - keep)


def _init_norms(model: RWKV6, config: ModelConfig) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
    for layer, block in enumerate(model.blocks):
        block.att.ln_x.weight.fill_(((1 + layer) / config.n_layer) ** 0.7)


def _init_matrices(model: RWKV6, config: ModelConfig, generator: torch.Generator) -> None:
    model.emb.weight.uniform_(-1e-4, 1e-4, generator=generator)
    head_gain = 0.5 * math.sqrt(max(1.0, config.vocab_size / config.n_embd))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(ZERO_LINEARS):
            module.weight.zero_()
        else:
            gain = head_gain if name == "head" else 0.1 if name.endswith(SMALL_LINEARS) else 1.0
            nn.init.orthogonal_(module.weight, gain=gain, generator=generator)
