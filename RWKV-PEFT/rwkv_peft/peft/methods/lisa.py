"""LISA (arXiv 2403.17919): full training of a few randomly chosen blocks at a time.

The blocks change every `interval` steps. Embedding, head and final norm always train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rwkv_peft.config.method import MethodConfig
from rwkv_peft.peft.base import Method


@dataclass(frozen=True, kw_only=True)
class LisaConfig(MethodConfig):
    """Options of `--peft lisa`."""

    name = "lisa"
    trains_base = True
    changes_active_blocks = True

    layers: int = 2
    """Number of blocks that train at a time."""
    interval: int = 20
    """Optimizer steps until other blocks are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("layers", "interval"):
            self.require(key, getattr(self, key) >= 1, "a positive integer")

    def active_blocks(self, step: int, n_layer: int, seed: int) -> frozenset[int]:
        """Return the blocks of draw number step // interval, `layers` of them without replacement."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step // self.interval)
        return frozenset(torch.randperm(n_layer, generator=generator)[: self.layers].tolist())


METHOD = Method(config=LisaConfig)
