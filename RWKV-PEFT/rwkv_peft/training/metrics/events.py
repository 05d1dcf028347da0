"""What happens in a run, as dataclasses: each is one line of metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Event(Protocol):
    """A dataclass with the optimizer step that it belongs to, and values under unique names."""

    step: int


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    """Optimizer steps of the run so far."""
    loss: float
    """Mean over the step's tokens in the loss, of all micro-batches and devices."""
    lr: float
    tokens: int
    """Tokens in the loss of this step, on all devices."""
    tokens_per_s: float
    """Tokens in the loss per second; padding and masked tokens do not count."""
    grad_norm: float
    """Before clipping."""
    time: float
    """Seconds of training, including those before a resume."""
    skipped: str | None = None
    """Reason why the update was skipped; None if it was made."""
    samples: list[list[int]] | None = None
    """Epoch and index of the samples of a skipped step, on all devices."""


@dataclass(frozen=True)
class ValidationMetrics:
    """One validation."""

    step: int
    """Optimizer steps of the run so far."""
    val_loss: float
    """Mean over the validation set's tokens in the loss, in nats."""
    val_ppl: float
    """exp(val_loss)."""
    val_tokens: int
    """Tokens in the loss."""
    time: float
    """Seconds of training so far, without validations."""


def to_row(event: Any) -> dict[str, Any]:
    """Convert an event to a JSON object. Numbers that are not finite become null; fields that are None are omitted."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(event).items()
        if value is not None
    }
