"""The progress line: it fits into the terminal, and estimates the remaining time from this process's steps."""

from __future__ import annotations

import pytest

from rwkv_peft.metrics_history import Average
from rwkv_peft.training.metrics.events import StepMetrics
from rwkv_peft.training.metrics.progress import Progress


def step(number: int, time: float, **changes) -> StepMetrics:
    values = {"loss": 12.3456, "lr": 2e-5, "tokens": 100, "tokens_per_s": 10.0, "grad_norm": 123.4, **changes}
    return StepMetrics(step=number, time=time, **values)


def test_a_line_is_shorter_than_its_terminal():
    progress = Progress(100_000)
    progress(step(99_999, 1.0))
    full = progress.line(step(99_999, 2.0))
    for width in range(24, 140):
        line = progress.line(step(99_999, 2.0), width)
        assert len(line) < width or line == "train  99%  step 99999/100000"
        assert (line == full) == (width > len(full)), "a part is only omitted if it does not fit"


def test_a_small_gradient_norm_is_not_zero():
    assert "gnorm 3.2e-05" in Progress(9).line(step(1, 1.0, grad_norm=3.2e-5))


@pytest.mark.parametrize("earlier", [0.0, 5000.0], ids=["new run", "resumed run"])
@pytest.mark.parametrize("first", [1, 501])
def test_the_slow_first_step_does_not_count_for_the_time_left(first, earlier):
    """The first of 100 steps takes ten seconds, the others two."""
    progress, total = Progress(first + 99), first + 99
    progress(step(first, earlier + 10))
    assert progress.seconds_left(step(first, earlier + 10)) == pytest.approx(99 * 10)
    for number in range(1, 50):
        progress(step(first + number, earlier + 10 + 2 * number))
    assert progress.seconds_left(step(first + 49, earlier + 108)) == pytest.approx(2 * (total - first - 49))
    assert "left 0:01:40" in progress.line(step(first + 49, earlier + 108))


def test_a_resumed_run_continues_the_average():
    whole, resumed = Progress(9), Progress(9, first_step=2, losses=[5.0, 3.0])
    for number, loss in enumerate((5.0, 3.0, 4.0), 1):
        whole(step(number, number, loss=loss))
    resumed(step(3, 3.0, loss=4.0))
    assert resumed.average == whole.average


def test_plain_lines_come_every_ten_seconds_and_at_the_end(capsys):
    progress = Progress(5)
    for number, time in enumerate((1, 6, 11.5, 13, 14), 1):
        progress(step(number, time))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "3", "5"]


def test_the_average_is_exponential_and_ignores_nonfinite_values():
    values = [5.0, 3.0, 4.0, 1.0]
    weights = [0.95**age for age in reversed(range(4))]
    expected = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    average = Average()
    results = [average(value) for value in (5.0, 3.0, float("nan"), 4.0, float("inf"), 1.0)]
    assert results[0] == 5.0
    assert results[1] == results[2]
    assert results[-1] == pytest.approx(expected)
