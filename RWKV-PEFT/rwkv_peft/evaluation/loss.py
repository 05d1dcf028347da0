"""Loss on held-out documents."""

from __future__ import annotations

import torch

from rwkv_peft.config import DataConfig
from rwkv_peft.data.binidx import BinidxReader
from rwkv_peft.data.sampling import Samples
from rwkv_peft.model.rwkv6 import RWKV6


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
    reader = BinidxReader(data_file)
    config = DataConfig(data_file=data_file, ctx_len=ctx_len, micro_bsz=batch, dataload="pad", loss_mask="pad")
    samples = Samples(reader, config, model.config.vocab_size)
    device, total, count = model.emb.weight.device, 0.0, 0
    for first in range(0, len(reader), batch):
        rows = [samples.sample(0, 0, index) for index in range(first, min(first + batch, len(reader)))]
        ids, targets, mask = (
            torch.stack([torch.from_numpy(row[key]) for row in rows]).to(device)
            for key in ("input_ids", "targets", "loss_mask")
        )
        trained = int(mask.sum())
        hidden, _ = model.hidden(ids)
        total += float(model.loss(hidden, targets, mask)) * trained
        count += trained
    return total / count
