"""One optimizer step: what Lightning hands to it, and that it is one mean over all tokens of its micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rwkv_peft.adapted_model import load_with_adapter
from rwkv_peft.training.step import TrainingModule
from tests.training.small_runs import train, write_inputs

FLAGS = "--micro_bsz 2 --accumulate_grad_batches 2 --epoch_steps 5 --epoch_count 2 --lr_init 0 --lr_final 0".split()
"""Three steps per epoch, the last with one micro-batch only. With a learning rate of 0 the weights never change."""


def test_an_epochs_last_step_may_be_shorter(tmp_path, monkeypatch):
    """Losses, token counts and gradient norms are those of all rows of a step in one batch."""
    received, plain = [], TrainingModule.training_step

    def recording(module: TrainingModule, micro_batches: list[dict[str, Tensor]], batch_idx: int) -> None:
        received.append(micro_batches)
        plain(module, micro_batches, batch_idx)
        assert module.step == len(received)

    monkeypatch.setattr(TrainingModule, "training_step", recording)
    inputs = write_inputs(tmp_path)
    rows = train(tmp_path / "run", inputs, "--peft", "bone", "--bone_config", '{"r":16}', "--grad_clip", "0", *FLAGS)

    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [len(micro_batches) for micro_batches in received] == [2, 2, 1, 2, 2, 1]
    samples = [tuple(row) for step in received for batch in step for row in batch["sample"].tolist()]
    assert samples == [(epoch, index) for epoch in range(2) for index in range(10)], "in order"
    counts = [[int(batch["loss_mask"].sum()) for batch in step] for step in received]
    assert any(len(set(step)) == 2 for step in counts), "micro-batches must differ in their number of tokens"

    model = load_with_adapter(inputs[1], tmp_path / "run" / "rwkv-0.safetensors").model
    trained = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith(".bone")]
    for row, step in zip(rows, received, strict=True):
        whole = {key: torch.cat([batch[key] for batch in step]) for key in step[0]}
        loss = model.loss(model.hidden(whole["input_ids"])[0], whole["targets"], whole["loss_mask"])
        norm = math.hypot(*(float(gradient.norm()) for gradient in torch.autograd.grad(loss, trained)))
        assert row["tokens"] == int(whole["loss_mask"].sum())
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
