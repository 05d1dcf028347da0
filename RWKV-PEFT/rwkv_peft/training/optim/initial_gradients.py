"""Gradients of the base's weights on a few batches, for methods that initialize from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.sliced_loss import sliced_loss


def mean_gradients(
    model: RWKV6, layers: Sequence[str], batches: Iterable[dict[str, Tensor]], chunk: int = 0
) -> dict[str, Tensor]:
    """Return dL/dW of some layers' weights, by layer name, in fp32 on the CPU.

    L is the mean loss over the tokens in the loss of all batches. The gradients together are as large as the weights
    in fp32. Only one at a time is on the model's device, unless slices accumulate there.

    Args:
        model: not changed.
        layers: qualified names.
        batches: from the data module.
        chunk: tokens per slice, as for `sliced_loss`; the gradients are those of the whole rows.
    """
    sums: dict[str, Tensor] = {}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in layers}
    hooks = [weight.register_post_accumulate_grad_hook(_collector(sums, name)) for name, weight in weights.items()]
    tokens = 0
    for batch in batches:
        count = int(batch["loss_mask"].sum())
        (sliced_loss(model, batch, chunk) * count).backward()
        tokens += count
    for hook in hooks:
        hook.remove()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    return {name: total / max(1, tokens) for name, total in sums.items()}


def _collector(sums: dict[str, Tensor], name: str):
    """Return a hook that moves a weight's gradient into `sums` as soon as it exists."""

    def collect(weight: torch.nn.Parameter) -> None:
        gradient = weight.grad.float().cpu()
        sums[name] = sums[name].add_(gradient) if name in sums else gradient
        weight.grad = None

    return collect
