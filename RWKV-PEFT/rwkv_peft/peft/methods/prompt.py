"""Prompt tuning (arXiv 2104.08691): trainable vectors before every text; the model itself is frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rwkv_peft.config.method import MethodConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.peft.base import Method


@dataclass(frozen=True, kw_only=True)
class PromptConfig(MethodConfig):
    """Options of `--peft prompt`."""

    name = "prompt"
    allows_packing = False
    meaning = ("tokens",)

    tokens: int = 20
    """Number of trainable vectors before the text."""
    load: str = ""
    """Adapter file to start from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("tokens", self.tokens >= 1, "a positive integer")


PROMPT_NAME = "prompt"
"""Name of the parameter in the model and in the adapter file."""


def add_prompt(model: nn.Module, config: PromptConfig, dtype: torch.dtype, initialize: bool) -> None:
    """Set `model.prompt` (tokens, C) to the embeddings of random tokens of the vocabulary, in place.

    Raises:
        ConfigError: the model has no attribute `prompt`.
    """
    if not hasattr(model, PROMPT_NAME):
        raise ConfigError(
            "peft", found="prompt", expected="a method with layers", what="this model does not support prompts"
        )
    embedding = model.emb.weight
    prompt = torch.zeros(config.tokens, embedding.shape[1], device=embedding.device, dtype=dtype)
    if initialize and not embedding.is_meta:
        prompt.copy_(embedding.detach()[torch.randint(embedding.shape[0], (config.tokens,))])
    model.prompt = nn.Parameter(prompt)


METHOD = Method(config=PromptConfig, add=add_prompt)
