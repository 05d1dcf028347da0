"""The loss of a batch of rows, run as a whole or in slices that pass the state on (`--train_type infctx`).

B batch, T tokens of a row, C n_embd, H heads, N head size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.model.state import LayerState, ModelState
from rwkv_peft.training.distributed.sharding import forward_passes_needed


def sliced_loss(model: RWKV6, batch: Mapping[str, Tensor], chunk: int, full: bool = True) -> Tensor:
    """Return the mean loss over a batch's tokens in the loss, running its rows `chunk` tokens at a time.

    The forward pass keeps only the state before each slice, B (2 C + H N N) elements per layer. The backward pass runs
    the slices again, from the last to the first; the last one is not run twice.

    Args:
        model: with any adapter; a prompt or a tuned state comes before the first slice.
        batch: input_ids, targets (B, T) int64, loss_mask (B, T) bool, and starts (B, T) bool for packed rows. Any T:
            the last slice may be shorter.
        chunk: tokens per slice; 0 runs each row as a whole.
        full: backpropagate from each slice into earlier ones, which gives the gradient of the whole row; False stops
            gradients at each slice's first token.
    Returns:
        A scalar in fp32 or wider, equal to the loss of the whole row.
    """
    parts = _slices(batch, _lengths(model, batch["input_ids"], chunk))
    counts = [part["loss_mask"].sum() for part in parts]
    losses, state = [], None
    for part in parts[:-1]:
        # Reentrant checkpointing silently gives wrong gradients after a frozen embedding.
        loss, state = checkpoint(_run, model, part, state, use_reentrant=False)
        losses.append(loss)
        if not full:
            state = [LayerState(s.att_shift.detach(), s.wkv.detach(), s.ffn_shift.detach()) for s in state]
    losses.append(_run(model, parts[-1], state)[0])
    if len(losses) == 1:
        return losses[0]
    shares = torch.stack(counts).to(losses[0].dtype)
    return (torch.stack(losses) * shares).sum() / shares.sum().clamp(min=1)


def _run(model: RWKV6, part: Mapping[str, Tensor], state: ModelState | None) -> tuple[Tensor, ModelState]:
    """Return the mean loss of one slice and the state after it."""
    hidden, after = model.hidden(part["input_ids"], state, part.get("starts"))
    return model.loss(hidden, part["targets"], part["loss_mask"]), after


def _slices(batch: Mapping[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """Cut the batch along T; padding after a row's end is not in the loss."""
    keys = [key for key in ("input_ids", "targets", "loss_mask", "starts") if key in batch]
    beyond = sum(lengths) - batch["input_ids"].shape[1]
    columns = [F.pad(batch[key], (0, beyond)).split(list(lengths), dim=1) for key in keys]
    return [dict(zip(keys, part, strict=True)) for part in zip(*columns, strict=True)]


def _lengths(model: RWKV6, ids: Tensor, chunk: int) -> list[int]:
    """Return the number of tokens of each slice.

    Under ZeRO-3 all processes need as many slices as the one with the longest row. The others add slices of one token
    of padding.
    """
    whole, rest = divmod(ids.shape[1], chunk or ids.shape[1])
    lengths = [chunk or ids.shape[1]] * whole + [rest] * (rest > 0)
    return lengths + [1] * (forward_passes_needed(len(lengths), model, ids.device) - len(lengths))
