"""Validation loss of a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evaluation.loss import validation_loss
from tests.helpers import lively_model, with_shape


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_validation_loss_is_the_mean_over_all_tokens(batch, tmp_path):
    """Compared with each document alone: the batch in which a document is padded must not matter."""
    documents = [[4, 9, 16, 0], [7, 0], [1, 2, 3, 4, 5, 6, 7, 8, 0], [200, 0, 100, 0]]
    with BinidxWriter(tmp_path / "data", load_tokenizer("bytes")) as writer:
        for ids in documents:
            writer.add_document(ids)
    model = lively_model(with_shape(vocab_size=257)).eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(torch.tensor([ids[:-1]]))[0][0], torch.tensor(ids[1:]), reduction="none")
            for ids in documents
        ]
    expected = torch.cat(losses).mean().item()
    assert validation_loss(model, str(tmp_path / "data"), ctx_len=16, batch=batch) == pytest.approx(expected, rel=1e-5)
