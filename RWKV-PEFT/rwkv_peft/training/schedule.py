"""The learning rate as a pure function of the step."""

from __future__ import annotations

from rwkv_peft.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """RWKV-LM's schedule: warmup from 1 %, then exponentially from lr_init to lr_final.

    Args:
        step: optimizer steps done so far, 0 for the first.
        total_steps: optimizer steps of the whole run.
        optim: rates and warmup. A rate of 0 at either end makes the way between them linear.
    """
    begin, end = optim.lr_init, optim.lr_final
    if step < optim.warmup_steps:
        return begin * (0.01 + 0.99 * step / optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps - 1))
    if begin == 0 or end == 0:
        return begin + (end - begin) * progress
    return begin * (end / begin) ** progress
