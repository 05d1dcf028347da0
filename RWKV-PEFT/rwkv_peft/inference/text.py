"""Load a model and complete text with it: the functions `rwkv_peft.load` and `rwkv_peft.generate`."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkv_peft.adapted_model import load_plain, load_with_adapter
from rwkv_peft.data.tokenizer import Tokenizer, load_tokenizer
from rwkv_peft.errors import ConfigError
from rwkv_peft.inference.generate import generate as generate_ids
from rwkv_peft.model.rwkv6 import RWKV6


def load(model: str | Path, adapter: str | Path | None = None, *, dtype: torch.dtype | None = None) -> RWKV6:
    """Load a model for inference, on the CPU and in eval mode.

    Example:
        >>> model = rwkv_peft.load("base.pth", adapter="out/rwkv-0.safetensors")
        >>> logits, state = model(torch.tensor([[33, 44, 55]]))

    Args:
        model: `.pth` file of a base model or a merged model.
        adapter: `.safetensors` file of an adapter that was trained on this model; it is not merged.
        dtype: of the activations and the large matrices; None keeps the dtype of the file.
    Returns:
        The model. Its input is token ids (B, T); it returns logits (B, T, V) and the state after the last token.
    Raises:
        CheckpointError: a file is missing or damaged, or the adapter was trained on another base model.
    """
    if adapter is None:
        return load_plain(model, dtype=dtype)
    return load_with_adapter(model, adapter, dtype=dtype).model


def generate(
    model: RWKV6,
    prompt: str,
    *,
    tokenizer: str | Tokenizer = "world",
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> str:
    r"""Complete a text. Generation ends at the tokenizer's end-of-document token, or after `max_tokens`.

    Example:
        >>> rwkv_peft.generate(model, "User: What is 1 + 2?\n\nAssistant:", max_tokens=50)
        ' 3'

    Args:
        model: see `load`; on any device.
        prompt: text to continue, not empty.
        tokenizer: the model's tokenizer: world (public RWKV models), bytes, the path of a tokenizer.json, or an object.
        max_tokens: largest number of new tokens.
        temperature: divides the logits before sampling; 0 always takes the most likely token.
        top_p: sample from the most likely tokens, whose probabilities add up to this value.
        seed: of the sampling; the same seed gives the same text.
    Returns:
        The new text, without the prompt.
    Raises:
        ConfigError: unknown tokenizer, a tokenizer with more ids than the model's vocabulary, or an empty prompt.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    check_tokenizer(tokenizer, model)
    if not (ids := tokenizer.encode(prompt)):
        raise ConfigError("prompt", what="empty", expected="at least one token")
    new_ids = generate_ids(
        model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=tokenizer.eod,
        seed=seed,
    )
    return tokenizer.decode(new_ids)


def check_tokenizer(tokenizer: Tokenizer, model: RWKV6) -> None:
    """Raise ConfigError if the tokenizer has more ids than the model's vocabulary."""
    found, vocabulary = tokenizer.vocab_size, model.config.vocab_size
    if found > vocabulary:
        what = f"{tokenizer.spec} has more token ids than the model's vocabulary"
        hint = "Use the tokenizer of the model's training data."
        raise ConfigError("tokenizer", what=what, found=found, expected=f"at most {vocabulary}", hint=hint)
