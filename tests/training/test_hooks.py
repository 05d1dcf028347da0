"""The order of what happens around optimizer steps."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.hooks import RunHooks

BATCH = [{}, {}]
"""Two micro-batches."""


class Stop(Exception):
    """Stands for the exception that ends training."""


class Setup:
    """Hooks whose parts only record how they are called.

    Args:
        validates: whether the run has a validation set.
        options: of RunHooks.
    """

    def __init__(self, *, validates: bool = True, **options: int) -> None:
        self.parts = Mock()
        self.parts.signals.agree.return_value = False
        self.parts.signals.agreed = 0
        self.parts.signals.stop.side_effect = Stop
        self.parts.checkpoints.is_due.return_value = False
        self.parts.validator.has_measured = False
        self.trainer = Mock(current_epoch=0, max_epochs=2, should_stop=False, is_last_batch=False)
        self.hooks = RunHooks(
            recorder=self.parts.recorder,
            validator=self.parts.validator if validates else None,
            checkpoints=self.parts.checkpoints,
            signals=self.parts.signals,
            samples=self.parts.samples,
            save=self.parts.save,
            **{"first_epoch": 0, "epochs_done": 0, "epoch_save": 1, **options},
        )

    def step(self) -> list[str]:
        self.hooks.on_train_batch_end(self.trainer, Mock(), None, BATCH, 0)
        return self.calls()

    def epoch_end(self) -> list[str]:
        self.hooks.on_train_epoch_end(self.trainer, Mock())
        return self.calls()

    def calls(self) -> list[str]:
        """Return the names of the calls so far, and forget them."""
        names = [name for name, _, _ in self.parts.mock_calls]
        self.parts.reset_mock()
        return names

    def stops(self) -> None:
        """Let a signal have arrived."""
        self.parts.signals.agree.return_value = True
        self.parts.signals.agreed = 15


STEP = ["checkpoints.count_batches", "recorder.record", "validator.after_step", "signals.agree"]


def test_the_start_restores_before_it_measures():
    setup = Setup()
    setup.hooks.on_fit_start(setup.trainer, Mock())
    setup.hooks.on_train_start(setup.trainer, Mock())
    setup.hooks.on_train_batch_start(setup.trainer, Mock(), BATCH, 0)
    assert setup.calls() == [
        "checkpoints.check_processes_agree",
        "signals.install",
        "checkpoints.restore",
        "samples.write",
        "recorder.start",
        "validator.validate",
        "checkpoints.restore_random_state",
    ]


def test_a_resumed_run_does_not_repeat_the_first_validation():
    setup = Setup()
    setup.parts.validator.has_measured = True
    setup.hooks.on_train_start(setup.trainer, Mock())
    assert "validator.validate" not in setup.calls()


def test_a_step_is_recorded_before_it_is_saved():
    setup = Setup()
    assert not setup.hooks.made_step
    assert setup.step() == [*STEP, "checkpoints.is_due"]
    assert setup.hooks.made_step
    setup.parts.checkpoints.is_due.return_value = True
    assert setup.step() == [*STEP, "checkpoints.is_due", "checkpoints.save"]


def test_micro_batches_are_counted():
    setup = Setup()
    setup.hooks.on_train_batch_end(setup.trainer, Mock(), None, BATCH, 0)
    setup.parts.checkpoints.count_batches.assert_called_once_with(2)


def test_a_signal_saves_everything_and_stops():
    setup = Setup(validates=False)
    setup.stops()
    with pytest.raises(Stop):
        setup.step()
    assert setup.calls()[-3:] == ["checkpoints.save", "save", "signals.stop"]


def test_a_signal_in_the_last_step_of_an_epoch_waits_for_its_end():
    """The epoch's weights and checkpoint come first."""
    setup = Setup()
    setup.stops()
    setup.trainer.is_last_batch = True
    assert setup.step() == STEP
    with pytest.raises(Stop):
        setup.epoch_end()
    assert setup.calls() == ["save", "checkpoints.save", "checkpoints.save", "save", "signals.stop"]


def test_a_signal_in_the_last_step_of_a_run_does_not_stop_it():
    setup = Setup()
    setup.stops()
    setup.trainer.current_epoch, setup.trainer.is_last_batch = 1, True
    assert setup.step() == STEP
    assert setup.epoch_end() == ["validator.measure_end", "save", "checkpoints.save"]


@pytest.mark.parametrize(("epoch", "saved"), [(0, False), (1, True), (2, False), (3, False), (4, True)])
def test_weights_are_saved_every_epoch_save_epochs_and_at_the_end(epoch, saved):
    """One epoch was done earlier, so the trainer's epoch 1 is the run's third."""
    setup = Setup(epochs_done=1, epoch_save=3, first_epoch=10)
    setup.trainer.current_epoch, setup.trainer.max_epochs = epoch, 5
    setup.hooks.on_train_epoch_end(setup.trainer, Mock())
    assert [call.args for call in setup.parts.save.call_args_list] == ([(11 + epoch,)] if saved else [])


def test_a_full_disk_ends_a_run_only_after_its_last_epoch(capsys):
    setup = Setup()
    setup.parts.save.side_effect = CheckpointError("rwkv-0", "cannot be written")
    assert setup.epoch_end() == ["save", "checkpoints.save"]
    assert "rwkv-0: cannot be written. Training continues." in capsys.readouterr().err
    setup.trainer.current_epoch = 1
    with pytest.raises(CheckpointError):
        setup.epoch_end()


def test_the_end_reports_the_best_validation_and_the_samples():
    setup = Setup()
    setup.hooks.on_train_end(setup.trainer, Mock())
    assert setup.calls() == ["validator.print_best", "samples.write", "samples.print_report"]
