"""The validation loss of a model on a data set."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.validation_set import ValidationSet
from rwkv_peft.model.rwkv6 import RWKV6


def summed(mean: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of a batch's cross-entropy in nats, and the number of its tokens in the loss.

    The sums of several batches and processes can be added. Their quotient is the mean per token, however the tokens
    are divided into batches.

    Args:
        mean: cross-entropy, averaged over the tokens in the loss; a scalar.
        mask: the tokens in the loss, (B, T).
    Returns:
        Sum and count, (2,) float64.
    """
    count = mask.sum().double()
    return torch.stack((mean.double() * count, count))


@torch.no_grad()
def validation_loss(model: RWKV6, data_file: str, *, ctx_len: int = 1024, batch: int = 8) -> float:
    """Return the mean cross-entropy per token, in nats, over all documents of a binidx pair.

    Each document starts from an empty state.

    Args:
        model: on any device.
        data_file: prefix of the pair.
        ctx_len: tokens of a document that are used; the rest of a longer document is ignored.
        batch: documents per batch; it does not change the result.
    Raises:
        DataError: the pair is missing or damaged, or has token ids that are not in the model's vocabulary.
    """
    config = DataConfig(data_file=data_file, ctx_len=ctx_len, micro_bsz=batch, dataload="pad", loss_mask="pad")
    validation = ValidationSet([BinidxReader(data_file)], config, model.config.vocab_size)
    device = model.emb.weight.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in validation.batches():
        ids, targets, mask = (rows[key].to(device) for key in ("input_ids", "targets", "loss_mask"))
        hidden, _ = model.hidden(ids)
        sums += summed(model.loss(hidden, targets, mask), mask)
    total, count = sums.tolist()
    return total / count
