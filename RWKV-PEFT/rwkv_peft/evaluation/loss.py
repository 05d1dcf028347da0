"""Loss on held-out documents."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.validation_set import ValidationSet
from rwkv_peft.model.rwkv6 import RWKV6


def summed(mean: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy summed over a batch's trained tokens, in nats, and their number: (2,) float64.

    Such pairs add up to the same mean whatever the batches and processes are.

    Args:
        mean: over the trained tokens, a scalar.
        mask: which tokens these are.
    """
    count = mask.sum().double()
    return torch.stack((mean.double() * count, count))


@torch.no_grad()
def held_out_loss(model: RWKV6, data_file: str, *, ctx_len: int = 1024, batch: int = 8) -> float:
    """Mean cross-entropy per token, in nats, over every document of a binidx pair, each from an empty state.

    Args:
        model: on any device.
        data_file: prefix of the pair.
        ctx_len: tokens of a document that count; the rest of a longer one is left out.
        batch: documents at a time.
    Raises:
        DataError: the pair is missing, damaged, or has ids beyond the model's vocabulary.
    """
    config = DataConfig(data_file=data_file, ctx_len=ctx_len, micro_bsz=batch, dataload="pad", loss_mask="pad")
    held_out = ValidationSet([BinidxReader(data_file)], config, model.config.vocab_size)
    device = model.emb.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in held_out.batches():
        ids, targets, mask = (rows[key].to(device) for key in ("input_ids", "targets", "loss_mask"))
        hidden, _ = model.hidden(ids)
        sums += summed(model.loss(hidden, targets, mask), mask)
    total, count = sums.tolist()
    return total / count
