"""A PEFT method's options, and what the method declares about itself.

The layers live in `peft/methods/`. This module only defines the base class of their options, so that the command line
and RunConfig can hold a method without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from rwkv_peft.config.field_types import TypedConfig
from rwkv_peft.errors import ConfigError

METHODS = ("none", "bone", "miss", "lora", "dora", "pissa", "olora", "lora_ga", "adapter", "prompt", "lisa")
"""Names of the methods of this package. Each except none is a module of `peft/methods/`."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(TypedConfig):
    """Options of one PEFT method. A subclass adds the options as fields and declares what the method implies."""

    name: ClassVar[str]
    """Value of `--peft`. A method outside this package sets `name = __name__`, the import path of its module."""
    trains_base: ClassVar[bool] = False
    """Whether the parameters of the base model themselves are trainable."""
    mergeable: ClassVar[bool] = False
    """Whether a trained adapter can be added to the base's matrices."""
    allows_packing: ClassVar[bool] = True
    """Whether `--dataload pack` may be used, which clears the model's state between documents."""
    changes_active_blocks: ClassVar[bool] = False
    """Whether only some blocks train at a time; see `active_blocks`."""
    meaning: ClassVar[tuple[str, ...]] = ()
    """Options that change what the adapter's tensors mean. A warm start needs the same values."""
    load = ""
    """Adapter file to start from; the methods of this package with an adapter make it an option."""
    rank_pattern = MappingProxyType({})
    """Another r for some layers, by a pattern of their names; an option of the methods that have an r."""

    @property
    def flag(self) -> str:
        """Name of the flag that takes the options, for error messages."""
        return flag_of(self.name)

    @property
    def gradient_samples(self) -> int:
        """Number of training samples for the gradients that the method's initialization needs; 0: it needs none."""
        return 0

    def active_blocks(self, step: int, n_layer: int, seed: int) -> frozenset[int] | None:
        """Return the blocks that train in an optimizer step; None means all. Depends on the arguments only."""
        return None

    def error(self, key: str, **details: Any) -> ConfigError:
        return ConfigError(self.flag, key, **details)


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Options of `--peft none`, full fine-tuning: there are none."""

    name = "none"
    trains_base = True


def flag_of(method: str) -> str:
    """Return the name of the flag that takes a method's options."""
    return f"{method}_config" if method in METHODS else "peft_config"
