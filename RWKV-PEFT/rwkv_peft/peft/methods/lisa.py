"""LISA (arXiv 2403.17919): full training of a few layers at a time, drawn anew every few steps.

Embedding, head and final norm always train; see training/optim/lisa.py for the drawing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rwkv_peft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LisaConfig:
    """Options of `--peft lisa`."""

    flag: ClassVar[str] = "lisa_config"

    layers: int = 2
    """Blocks that train at a time."""
    interval: int = 20
    """Optimizer steps between draws."""

    def __post_init__(self) -> None:
        for key in ("layers", "interval"):
            if getattr(self, key) < 1:
                raise ConfigError(self.flag, key, found=getattr(self, key), expected="a positive integer")
