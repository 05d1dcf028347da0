"""The model's recurrent state: everything the next token needs to know about the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_peft.config.sections import ModelConfig


@dataclass
class LayerState:
    """State of one block. B batch, C n_embd, H heads, N head size."""

    att_shift: Tensor
    """(B, C): time-mix's input at the last token."""
    wkv: Tensor | None
    """(B, H, N, N) fp32, indexed [key][value]. None before the first token: zeros, or the tuned initial state."""
    ffn_shift: Tensor
    """(B, C): channel-mix's input at the last token."""


ModelState = list[LayerState]
"""One LayerState per block."""


def first_state(config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> ModelState:
    """Return the state before the first token. `dtype` is the dtype of the activations."""
    shift = torch.zeros(batch, config.n_embd, device=device, dtype=dtype)
    return [LayerState(shift, None, shift) for _ in range(config.n_layer)]
