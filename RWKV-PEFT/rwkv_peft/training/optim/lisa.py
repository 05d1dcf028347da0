"""LISA's drawing (arXiv 2403.17919): which blocks train, a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.peft.methods.lisa import LisaConfig


class BlockDraw:
    """Freezes all blocks but a few, which are drawn anew every `interval` steps; the rest of the model always trains.

    Args:
        config: how many, how often.
        n_layer: blocks of the model.
        seed: of the run.
    """

    def __init__(self, config: LisaConfig, n_layer: int, seed: int) -> None:
        self.config, self.n_layer, self.seed = config, n_layer, seed
        self.drawn: int | None = None
        """Number of the draw in force."""
        self.trained: list[list[nn.Parameter]] = []
        """By block, what may train at all (`--train_parts`); known from the first `apply` on."""

    def blocks(self, draw: int) -> set[int]:
        """The blocks of a draw."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        return set(torch.randperm(self.n_layer, generator=generator)[: self.config.layers].tolist())

    def apply(self, blocks: Sequence[nn.Module], optimizer: Optimizer, step: int) -> None:
        """Freeze and thaw the model's blocks for an optimizer step.

        A frozen block's moments are dropped, which is what makes LISA small. DeepSpeed steps with a zero gradient where
        none comes, so the block's groups have a rate of 0 too (`active`), and moments are dropped at a thaw as well.
        Its groups do not hold the model's parameters, so we go by block.
        """
        draw = step // self.config.interval
        if draw == self.drawn:
            return
        self.drawn, chosen = draw, self.blocks(draw)
        if not self.trained:
            self.trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        for index, parameters in enumerate(self.trained):
            for parameter in parameters:
                parameter.requires_grad_(index in chosen)
                parameter.grad = parameter.grad if index in chosen else None
        for number, group in enumerate(optimizer.param_groups):
            was_active = group.get("active", 0)
            group["active"] = int(group["block"] is None or group["block"] in chosen)
            if not (was_active and group["active"]):
                for tensor in _with_moments(optimizer, number):
                    optimizer.state.pop(tensor, None)


def _with_moments(optimizer: Optimizer, number: int) -> list[Tensor]:
    """The tensors that the moments of a group are kept by."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return optimizer.param_groups[number]["params"]
    # ZeRO-3's groups are empty but while it steps.
    parts = optimizer.fp32_partitioned_groups_flat
    return [part for index, part in enumerate(parts) if optimizer.sub_group_to_group_id[index] == number]
