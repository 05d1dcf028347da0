"""Prompt tuning (arXiv 2104.08691): trained vectors that every text begins with, the model itself frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rwkv_peft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Options of `--peft prompt`."""

    flag: ClassVar[str] = "prompt_config"

    tokens: int = 20
    """Trained vectors before the text."""
    load: str = ""
    """Adapter file to start from."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(self.flag, "tokens", found=self.tokens, expected="a positive integer")


PROMPT_NAME = "prompt"
"""The parameter's name in the model, and in the adapter file."""


def add_prompt(model: nn.Module, config: PromptConfig, dtype: torch.dtype, initialise: bool) -> None:
    """Set `model.prompt`, (tokens, C), to the embeddings of random words of the vocabulary, in place.

    Raises:
        ConfigError: a model without a place for a prompt.
    """
    if not hasattr(model, PROMPT_NAME):
        raise ConfigError("peft", found="prompt", expected="a method with layers", what="this model takes no prompt")
    embedding = model.emb.weight
    prompt = torch.zeros(config.tokens, embedding.shape[1], device=embedding.device, dtype=dtype)
    if initialise and not embedding.is_meta:
        prompt.copy_(embedding.detach()[torch.randint(embedding.shape[0], (config.tokens,))])
    model.prompt = nn.Parameter(prompt)
