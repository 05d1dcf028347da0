"""The recorder: what it reports of a step, and which time counts as training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.config.sections import OptimConfig
from rwkv_peft.errors import UserError
from rwkv_peft.training.metrics import recorder as recorder_file
from rwkv_peft.training.metrics.events import StepMetrics, ValidationMetrics
from rwkv_peft.training.metrics.recorder import Recorder
from rwkv_peft.training.optim.bad_steps import StepGuard
from rwkv_peft.training.step import StepResult


class Clock:
    """Replaces the module `time`; the test moves it."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder_file, "time", clock)
    return clock


class Events(list):
    """A consumer that keeps all events."""

    __call__ = list.append


def module_after(step: int, skipped: str | None = None, **optim: int) -> SimpleNamespace:
    """Return what the recorder reads of a TrainingModule."""
    result = StepResult(loss=2.0 + step, lr=1e-3, tokens=50, grad_norm=0.5, skipped=skipped)
    guard = StepGuard(OptimConfig(**optim))
    guard.skipped, guard.in_a_row = skipped, int(skipped is not None)
    return SimpleNamespace(step=step, result=result, guard=guard, all_gather=lambda samples: samples)


MICRO_BATCHES = [{"sample": torch.tensor([[0, 7], [0, 5]])}, {"sample": torch.tensor([[0, 6]])}]


def test_excluded_seconds_are_not_training_time(clock):
    """Validation calls `exclude`; earlier seconds are those of the run before a resume."""
    events = Events()
    recorder = Recorder([events], seconds=1000.0)
    recorder.start()
    clock.now += 2
    recorder.record(None, module_after(1), MICRO_BATCHES)
    clock.now += 30  # a validation
    recorder.exclude(30)
    recorder.report(ValidationMetrics(1, 3.0, 20.1, 10, recorder.seconds()))
    clock.now += 5
    recorder.record(None, module_after(2), MICRO_BATCHES)
    assert [event.time for event in events] == [1002.0, 1002.0, 1007.0]
    assert [event.tokens_per_s for event in events if isinstance(event, StepMetrics)] == [25.0, 10.0]
    assert events[0] == StepMetrics(1, 3.0, 1e-3, 50, 25.0, 0.5, 1002.0)
    assert recorder.last_loss == 4.0


def test_a_skipped_step_is_reported_with_its_samples_before_the_run_ends(clock):
    events = Events()
    recorder = Recorder([events])
    recorder.start()
    clock.now += 1
    with pytest.raises(UserError, match=r"training step 1: 1 steps in a row were skipped .*samples .* 0:5, 0:6, 0:7"):
        recorder.record(None, module_after(1, "not finite", max_bad_steps=1), MICRO_BATCHES)
    (event,) = events
    assert (event.skipped, event.samples) == ("not finite", [[0, 5], [0, 6], [0, 7]])
