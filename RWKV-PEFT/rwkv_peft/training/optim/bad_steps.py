"""Steps that would do harm: skipped and counted, and the run stopped where they do not end.

A step is judged by its global gradient norm, before the optimizer sees it. A loss that is not finite makes the
gradient so (`keep_honest`), on every process once gradients are averaged: all come to the same verdict by themselves.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.errors import UserError

WINDOW = 100
"""Norms of good steps that the median is taken of."""
FEWEST_NORMS = 10
"""Good steps before the first spike can be told."""
OVERFLOW = "overflow in fp16, the loss scale is halved"
"""Why a step was skipped that is no bad one."""
SHOWN_SAMPLES = 8
"""Samples that a message names; metrics.jsonl has them all."""


class StepGuard:
    """Judges optimizer steps, and remembers what it takes to do so.

    Args:
        optim: `grad_spike` and `max_bad_steps`.
    """

    def __init__(self, optim: OptimConfig) -> None:
        self.grad_spike, self.max_bad_steps = optim.grad_spike, optim.max_bad_steps
        self.norm = math.nan
        """Global gradient norm of the last step, before clipping."""
        self.skipped: str | None = None
        """Why the last step was skipped; None where it was made."""
        self.culprit: str | None = None
        """The first parameter whose gradient was not finite in the last step, where one process has it whole."""
        self.bad_steps = self.overflows = self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def allows(self, norm: float, *, overflowed: bool = False) -> bool:
        """Whether a step with this gradient may be made. `overflowed`: fp16's loss scale was too high, no more."""
        self.norm, self.culprit = norm, None
        self.skipped = OVERFLOW if overflowed else self._objection(norm)
        if overflowed:
            self.overflows += 1
        elif self.skipped:
            self.bad_steps += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            if norm > 0:  # a step in which nothing trains says nothing of those in which something does
                self._norms.append(norm)
        return self.skipped is None

    def _objection(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return "loss or gradient not finite"
        if not self.grad_spike or len(self._norms) < FEWEST_NORMS:
            return None
        median = statistics.median(self._norms)
        if norm <= self.grad_spike * median:
            return None
        return f"gradient norm {norm:.3g} above --grad_spike {self.grad_spike:g} x the median of {median:.3g}"

    def stop_if_hopeless(self, step: int, loss: float, lr: float, samples: Sequence[Sequence[int]]) -> None:
        """Raise UserError with a diagnosis after `max_bad_steps` skipped steps in a row."""
        if self.in_a_row < self.max_bad_steps:
            return
        facts = [f"loss {loss:.4g}, gradient norm {self.norm:.4g}, learning rate {lr:.3g}"]
        if self.culprit and math.isfinite(loss):  # else all are
            facts.append(f"first gradient that is not finite: {self.culprit}")
        if samples:
            facts.append(f"samples {shown(samples)}")
        what = f"{self.in_a_row} steps in a row were skipped ({self.skipped}); {'; '.join(facts)}"
        raise UserError(f"training step {step}", what, hint=f"Saved files are as they were. {self._advice(loss)}")

    def _advice(self, loss: float) -> str:
        if math.isfinite(self.norm):
            return "Try a lower --lr_init, or a larger --grad_spike if the norm has grown for good."
        if math.isfinite(loss):
            return "Try a lower --lr_init, a longer --warmup_steps, or --precision fp32."
        return "Try --precision fp32; a lower --lr_init; and look at these samples with tools/inspect.py."

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        counts = {name: getattr(self, name) for name in ("bad_steps", "overflows", "in_a_row")}
        return {**counts, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.bad_steps, self.overflows, self.in_a_row = state["bad_steps"], state["overflows"], state["in_a_row"]
        self._norms = deque(state["norms"], maxlen=WINDOW)


def shown(samples: Sequence[Sequence[int]]) -> str:
    """(epoch, index) pairs for a message; the first few of many."""
    words = ", ".join(f"{epoch}:{index}" for epoch, index in samples[:SHOWN_SAMPLES])
    more = len(samples) - SHOWN_SAMPLES
    return f"(epoch:index) {words}" + (f" and {more} more" if more > 0 else "")


def keep_honest(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is not finite where it is not itself: an infinite loss can have a finite one."""
    if loss.requires_grad:
        finite = torch.isfinite(loss.detach())
        loss.register_hook(lambda grad: torch.where(finite, grad, math.nan))
    return loss


def clip_or_skip(
    guard: StepGuard,
    named: Sequence[tuple[str, nn.Parameter]],
    limit: float,
    overflowed: Callable[[], bool] = lambda: False,
) -> None:
    """Clip gradients by their global norm, or drop them where the guard objects: an optimizer then changes nothing.

    For optimizers whose gradients are whole on every process.

    Args:
        named: what trains, by name.
        limit: largest norm; 0 for any.
        overflowed: whether a norm that is not finite is a matter of the loss scale; asked on all processes or none.
    """
    trained = [parameter for _, parameter in named if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    norm = float(total)
    if guard.allows(norm, overflowed=not math.isfinite(norm) and overflowed()):
        if limit:
            torch.nn.utils.clip_grads_with_norm_(trained, limit, total)
        return
    guard.culprit = next((name for name, p in named if p.grad is not None and not p.grad.isfinite().all()), None)
    for parameter in trained:
        parameter.grad = None


def guard_engine(engine_optimizer: Optimizer, guard: StepGuard) -> None:
    """Let the guard judge the steps of DeepSpeed's ZeRO optimizers (0.19), which they make inside.

    They take the global norm before anything else and make no step where it is not finite; so an infinite one takes
    the place of one that the guard objects to. Other processes see the same norm.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    def verdict(norm: Tensor) -> Tensor:
        return norm if guard.allows(float(norm)) else torch.full_like(norm, math.inf)

    if hasattr(engine_optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        engine_optimizer.check_grad_overflow = True  # bf16 parameters would make a step of any norm
        engine_optimizer.check_overflow = lambda **_: None  # what that asks for beside the norm, which tells as much
        whole_norm = engine_optimizer.scaled_global_norm
        engine_optimizer.scaled_global_norm = lambda *args: verdict(whole_norm(*args))
    else:
        norms = engine_optimizer._get_norm_groups
        engine_optimizer._get_norm_groups = lambda: [verdict(combine_grad_norm_groups(norms()))]
