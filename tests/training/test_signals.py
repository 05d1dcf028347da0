"""Stopping a run on a signal: noted until the end of the step, and agreed on by all processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv_peft.training.signals import StopSignals

MODULE = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    """Installed signal handlers; the previous ones are restored afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopSignals()
    stop.install()
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def trainer_with(others: int = 0) -> SimpleNamespace:
    """A trainer with another process, which has received the signal `others`."""

    def reduce(noted: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        return torch.maximum(noted, torch.tensor(others))

    return SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))


def test_without_a_signal_the_run_continues(signals):
    assert not signals.agree(trainer_with(), MODULE)
    assert signals.agreed == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_does_not_interrupt_the_step(number, signals):
    os.kill(os.getpid(), number)
    assert signals.agreed == 0, "only `agree` decides"
    assert signals.agree(trainer_with(), MODULE)
    assert signals.agreed == number


def test_a_signal_to_another_process_stops_this_one_too(signals):
    assert signals.agree(trainer_with(others=signal.SIGTERM), MODULE)
    assert signals.agreed == signal.SIGTERM


def test_a_second_ctrl_c_interrupts_immediately(signals):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_does_not_interrupt(signals):
    """Cluster managers send it repeatedly."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.agree(trainer_with(), MODULE)


def test_stop_ends_training_as_lightning_does(signals):
    with pytest.raises(SIGTERMException):
        signals.stop()
