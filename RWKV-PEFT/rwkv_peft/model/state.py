"""What a sequence leaves behind for the tokens that follow it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.config import ModelConfig


@dataclass
class LayerState:
    """State of one block; B batch, C n_embd, H heads, N head size."""

    att_shift: Tensor
    """(B, C): the last input of time-mix."""
    wkv: Tensor
    """(B, H, N, N) fp32, indexed [key][value]."""
    ffn_shift: Tensor
    """(B, C): the last input of channel-mix."""


ModelState = list[LayerState]
"""One LayerState per block."""


def zero_state(config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> ModelState:
    """The state before the first token. `dtype` is the activations'; wkv is fp32, or float64 with float64."""
    shift = torch.zeros(batch, config.n_embd, device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    wkv = torch.zeros(batch, config.n_head, config.head_size, config.head_size, device=device, dtype=wide)
    return [LayerState(shift, wkv, shift) for _ in range(config.n_layer)]
