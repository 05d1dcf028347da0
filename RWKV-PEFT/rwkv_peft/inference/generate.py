"""Text from a model, token by token, the state carried along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rwkv_peft.model.rwkv6 import RWKV6


@torch.no_grad()
def generate(
    model: RWKV6,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 0.9,
    stop: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the ids that follow `prompt`, until `stop` or `max_tokens`.

    Args:
        model: on any device.
        prompt: token ids, at least one.
        temperature: 0 takes the likeliest token every time.
        top_p: sample among the likeliest tokens whose probabilities reach this sum.
        stop: id that ends the text; it is not yielded.
        seed: of the sampling.
    """
    device = model.emb.weight.device
    generator = torch.Generator().manual_seed(seed)
    logits, state = model(torch.tensor([list(prompt)], device=device))
    for _ in range(max_tokens):
        token = sample_token(logits[0, -1].float().cpu(), temperature, top_p, generator)
        if token == stop:
            return
        yield token
        logits, state = model.step(torch.tensor([[token]], device=device), state)


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from (V,) logits."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # A token stays while the ones before it have not reached top_p; the first always stays.
    ordered[1:][(ordered.cumsum(0) - ordered)[1:] >= top_p] = 0.0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
