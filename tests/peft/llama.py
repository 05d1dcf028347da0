"""A small random LLaMA: a model that is not ours, for the tests that inject into one."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is worth a download

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SMALL = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # k_proj and v_proj are 32 x 64: rows and columns cannot be confused
    attention_bias=True,
)


def small_llama(seed: int = 0, *, wide_norms: bool = False, **changes) -> LlamaForCausalLM:
    """In eval mode, with weights large enough for every layer to matter.

    Args:
        seed: of the weights.
        wide_norms: take torch's RMSNorm. LLaMA's own rounds to fp32, which hides what a float64 comparison is for.
        changes: of `SMALL`.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL.to_dict() | changes)))
    if wide_norms:
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                parent, _, child = name.rpartition(".")
                norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
                setattr(model.get_submodule(parent), child, norm)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens(seed: int = 0) -> Tensor:
    """(2, 11) token ids of the small LLaMA."""
    return torch.randint(100, (2, 11), generator=torch.Generator().manual_seed(seed))


def weight_gradients(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Of every linear layer's weight by the layer's name, by a plain backward pass; the model keeps none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    grads = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, [m.weight for m in layers.values()])
    return dict(zip(layers, grads, strict=True))


def perturb(model: nn.Module, names: set[str], size: float = 0.05) -> None:
    """Add noise to the named parameters, in place: an adapter that is not the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
