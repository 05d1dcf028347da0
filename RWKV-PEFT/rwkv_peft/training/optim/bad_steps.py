"""Steps that would damage the model: skipped and counted, and the run ends if they continue.

A step is judged by its global gradient norm, before the optimizer uses the gradient. If a loss is not finite, its
gradient is made NaN (`spread_nonfinite`); once gradients are averaged, every process sees that and makes the
same decision.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.errors import UserError

WINDOW = 100
"""Number of good steps whose norms the median is computed from."""
MIN_NORMS = 10
"""Number of good steps before a spike can be recognized."""
OVERFLOW = "overflow in fp16, the loss scale is halved"
"""Reason for skipping a step that does not count as bad."""
SHOWN_SAMPLES = 8
"""Number of samples in a message; metrics.jsonl has all of them."""


class StepGuard:
    """Decides which optimizer steps are made.

    Args:
        optim: `grad_spike` and `max_bad_steps`.
    """

    def __init__(self, optim: OptimConfig) -> None:
        self.grad_spike, self.max_bad_steps = optim.grad_spike, optim.max_bad_steps
        self.norm = math.nan
        """Global gradient norm of the last step, before clipping."""
        self.skipped: str | None = None
        """Reason why the last step was skipped; None if it was made."""
        self.nonfinite_name: str | None = None
        """First parameter whose gradient was not finite in the last step, if this process has whole gradients."""
        self.bad_steps = self.overflows = self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def allows(self, norm: float, *, overflowed: bool = False) -> bool:
        """Judge a step by its gradient norm and return whether it may be made.

        Args:
            norm: global gradient norm before clipping.
            overflowed: the norm is not finite only because fp16's loss scale was too high.
        """
        self.norm, self.nonfinite_name = norm, None
        self.skipped = OVERFLOW if overflowed else self._objection(norm)
        if overflowed:
            self.overflows += 1
        elif self.skipped:
            self.bad_steps += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            if norm > 0:  # a step without tokens in the loss says nothing about the norms of other steps
                self._norms.append(norm)
        return self.skipped is None

    def clip_or_drop(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        max_norm: float,
        overflowed: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Clip gradients by their global norm, or drop them if the step is not allowed; return whether it is.

        For strategies under which every process has whole gradients.

        Args:
            named: trainable parameters by name.
            max_norm: maximum global norm; 0 turns clipping off.
            overflowed: whether a norm that is not finite is due to the loss scale; all processes call it, or none.
        """
        parameters = [parameter for _, parameter in named if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        norm = float(total)
        if self.allows(norm, overflowed=not math.isfinite(norm) and overflowed()):
            if max_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
            return True
        self.nonfinite_name = next(
            (name for name, p in named if p.grad is not None and not p.grad.isfinite().all()), None
        )
        for parameter in parameters:
            parameter.grad = None
        return False

    def stop_after_bad_steps(self, step: int, loss: float, lr: float, samples: Sequence[Sequence[int]]) -> None:
        """Raise UserError with a diagnosis after `max_bad_steps` skipped steps in a row."""
        if self.in_a_row < self.max_bad_steps:
            return
        facts = [f"loss {loss:.4g}, gradient norm {self.norm:.4g}, learning rate {lr:.3g}"]
        if self.nonfinite_name and math.isfinite(loss):  # with a NaN loss every gradient is NaN
            facts.append(f"first gradient that is not finite: {self.nonfinite_name}")
        if samples:
            facts.append(f"samples {format_samples(samples)}")
        what = f"{self.in_a_row} steps in a row were skipped ({self.skipped}); {'; '.join(facts)}"
        raise UserError(f"training step {step}", what, hint=f"Saved files are unchanged. {self._advice(loss)}")

    def _objection(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return "loss or gradient not finite"
        if not self.grad_spike or len(self._norms) < MIN_NORMS:
            return None
        median = statistics.median(self._norms)
        if norm <= self.grad_spike * median:
            return None
        return f"gradient norm {norm:.3g} above --grad_spike {self.grad_spike:g} x the median of {median:.3g}"

    def _advice(self, loss: float) -> str:
        if math.isfinite(self.norm):
            return "Try a lower --lr_init, or a larger --grad_spike if larger norms are normal by now."
        if math.isfinite(loss):
            return "Try a lower --lr_init, a longer --warmup_steps, or --precision fp32."
        return "Try --precision fp32 or a lower --lr_init, and look at these samples with rwkv-peft inspect."

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and norms with which a resumed run makes the same decisions."""
        counts = {name: getattr(self, name) for name in ("bad_steps", "overflows", "in_a_row")}
        return {**counts, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.bad_steps, self.overflows, self.in_a_row = state["bad_steps"], state["overflows"], state["in_a_row"]
        self._norms = deque(state["norms"], maxlen=WINDOW)


def format_samples(samples: Sequence[Sequence[int]]) -> str:
    """Format (epoch, index) pairs for a message, the first few if there are many."""
    words = ", ".join(f"{epoch}:{index}" for epoch, index in samples[:SHOWN_SAMPLES])
    more = len(samples) - SHOWN_SAMPLES
    return f"(epoch:index) {words}" + (f" and {more} more" if more > 0 else "")


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss, with a NaN gradient if it is not finite: an infinite loss can have a finite gradient."""
    if loss.requires_grad:
        finite = torch.isfinite(loss.detach())
        loss.register_hook(lambda grad: torch.where(finite, grad, math.nan))
    return loss
