"""Runs a test with every instruction set that the compiled CPU kernels have and this CPU supports."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def each_cpu_level(kernels: str) -> Iterator[str]:
    """Select one instruction set after the other and yield its name; `kernels` is wkv6, bone or mix."""
    ops = torch.ops.rwkv_peft
    use_level = getattr(ops, f"{kernels}_use_cpu_level")
    best, *_ = levels = getattr(ops, f"{kernels}_cpu_levels")()
    try:
        for level in levels:
            use_level(level)
            yield level
    finally:
        use_level(best)
