"""Generation of token ids, one at a time, with the model's recurrent state."""

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
    """Yield the ids that follow a prompt, until the id `stop` or `max_tokens` ids.

    Args:
        model: on any device.
        prompt: token ids, at least one.
        max_tokens: largest number of new ids.
        temperature: divides the logits before sampling; 0 always takes the most likely id.
        top_p: sample from the most likely ids, whose probabilities add up to this value.
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
    """Draw one id from the distribution of (V,) logits; see `generate` for the arguments."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    # Keep an id if the ids before it have not reached top_p; always keep the first.
    ordered[1:][(ordered.cumsum(0) - ordered)[1:] >= top_p] = 0.0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
