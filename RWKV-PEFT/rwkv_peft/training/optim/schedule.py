"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from rwkv_peft.config.sections import OptimConfig

DECAY_SHARE = 0.2
"""Share of the steps after warmup in which `wsd` decays; 20 % match a cosine schedule (arXiv 2405.18392, 4.1)."""


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of a step: warmup from 1 % as in RWKV-LM, then `--lr_schedule` from lr_init to lr_final.

    The last step has lr_final. A run of one step has lr_init, or the first rate of the warmup. If the run is shorter
    than its warmup, it ends before warmup is complete.

    Args:
        step: optimizer steps done so far, 0 for the first.
        total_steps: optimizer steps of the whole run; later steps keep the last rate.
        optim: rates, warmup and schedule.
    """
    warmup = max(0, optim.warmup_steps)
    if step < warmup:
        return optim.lr_init * (0.01 + 0.99 * step / warmup)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup - 1))
    return SCHEDULES[optim.lr_schedule](optim.lr_init, optim.lr_final, progress)


def _exponential(begin: float, end: float, progress: float) -> float:
    """Exponential decay as in RWKV-LM; linear if the rate at either end is 0."""
    if begin == 0 or end == 0:
        return _linear(begin, end, progress)
    return begin * (end / begin) ** progress


def _constant(begin: float, end: float, progress: float) -> float:
    return begin


def _linear(begin: float, end: float, progress: float) -> float:
    return begin * (1 - progress) + end * progress  # exact at both ends


def _cosine(begin: float, end: float, progress: float) -> float:
    """Half a cosine wave (SGDR without restarts, arXiv 1608.03983, eq. 5)."""
    return _linear(begin, end, 0.5 * (1 - math.cos(math.pi * progress)))


def _warmup_stable_decay(begin: float, end: float, progress: float) -> float:
    """Constant, then linear decay at the end (arXiv 2404.06395)."""
    return _linear(begin, end, max(0.0, (progress - (1 - DECAY_SHARE)) / DECAY_SHARE))


SCHEDULES: Mapping[str, Callable[[float, float, float], float]] = {
    "exp": _exponential,
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
}
"""(lr_init, lr_final, progress from 0 after warmup to 1 at the last step) -> rate."""
