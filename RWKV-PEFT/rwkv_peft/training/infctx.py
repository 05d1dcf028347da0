"""infctx: a long row in slices, the state passed on, in the memory that one slice takes.

B batch, T tokens of a row, C n_embd, H heads, N head size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.model.state import LayerState, ModelState


def sliced_loss(model: RWKV6, batch: Mapping[str, Tensor], chunk: int, full: bool = True) -> Tensor:
    """Mean loss over a batch's trained tokens, its rows run `chunk` tokens at a time.

    Of a slice only its state before the first token is kept, B (2 C + H N N) numbers a layer; the backward pass runs
    the slice again, from the last to the first. The last one is not run twice.

    Args:
        model: with any adapter; a prompt or a tuned state begins the first slice.
        batch: input_ids, targets (B, T) int64, loss_mask (B, T) bool, and where rows hold several texts, starts
            (B, T) bool. Any T: the last slice may be shorter.
        chunk: tokens of a slice; 0 runs each row whole.
        full: let gradients pass from a slice to the ones before, which gives the gradient of the whole row; False
            stops them at each slice's first token.
    Returns:
        A scalar, in fp32 or wider: what the whole row gives.
    """
    parts = _slices(batch, _lengths(model, batch["input_ids"], chunk))
    counts = [part["loss_mask"].sum() for part in parts]
    losses, state = [], None
    for part in parts[:-1]:
        # Reentrant checkpointing trains silently wrong below a frozen embedding.
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
    """Mean loss of one slice, and the state after it."""
    hidden, after = model.hidden(part["input_ids"], state, part.get("starts"))
    return model.loss(hidden, part["targets"], part["loss_mask"]), after


def _slices(batch: Mapping[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """The batch cut along T; past a row's end come tokens that do not train."""
    keys = [key for key in ("input_ids", "targets", "loss_mask", "starts") if key in batch]
    beyond = sum(lengths) - batch["input_ids"].shape[1]
    columns = [F.pad(batch[key], (0, beyond)).split(list(lengths), dim=1) for key in keys]
    return [dict(zip(keys, part, strict=True)) for part in zip(*columns, strict=True)]


def _lengths(model: RWKV6, ids: Tensor, chunk: int) -> list[int]:
    """Tokens of each slice.

    Under ZeRO-3 all processes gather each weight together, so all need as many slices as the one with the longest row:
    the others go on with slices of one token.
    """
    whole, rest = divmod(ids.shape[1], chunk or ids.shape[1])
    lengths = [chunk or ids.shape[1]] * whole + [rest] * (rest > 0)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        most = torch.tensor(len(lengths), device=ids.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        lengths += [1] * (int(most) - len(lengths))
    return lengths
