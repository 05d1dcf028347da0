"""A run writes report.html however it ends, and a report that cannot be written does no harm."""

from __future__ import annotations

import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.training import run
from rwkv_peft.training.fit import Fit
from tests.report.pages import read_page
from tests.training.optim.faults import NAN_LOSS, faults
from tests.training.small_runs import train, write_inputs

BONE = ["--peft", "bone", "--bone_config", '{"r":16}']


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


def test_a_run_writes_a_report_of_everything(inputs, tmp_path):
    (tmp_path / "prompts.txt").write_text("User: <b>Hi</b>\n")
    rows = train(tmp_path / "run", inputs, *BONE, "--sample_prompts", f"{tmp_path}/prompts.txt", "--logger", "csv")
    page = read_page(tmp_path / "run")
    for words in (
        "finished", "User: <b>Hi</b>", "Before training", "After step 6", "--lr_init", "blocks.*.att.key.bone",
        "96 documents", "rwkv-0.safetensors", "metrics.csv", "torch", "Python", "cores", "GiB", "all tokens",
        f"{sum(row['tokens'] for row in rows):,}",
    ):  # fmt: skip
        assert words in page.content, words
    assert [value for name, value in page.attributes if name == "aria-label"] == [
        "Loss, nats per token",
        "Learning rate",
        "Gradient norm, before clipping",
        "Trained tokens per second",
    ]
    for address in (value for name, value in page.attributes if name == "href"):
        assert (tmp_path / "run" / address).exists()


def test_a_run_that_fails_leaves_a_report_with_the_reason(inputs, tmp_path):
    with faults({0: NAN_LOSS}), pytest.raises(UserError, match="training step 1"):
        train(tmp_path / "run", inputs, *BONE, "--max_bad_steps", "1")
    assert "ended by an error: training step 1" in read_page(tmp_path / "run").content


def test_a_run_that_fails_before_its_first_step_leaves_no_report(inputs, tmp_path, monkeypatch):
    """The folder may contain the report of an earlier run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("earlier")

    def fail(fit):
        raise UserError("here", "no")

    monkeypatch.setattr(Fit, "run", fail)
    with pytest.raises(UserError):
        train(tmp_path / "run", inputs, *BONE)
    assert (tmp_path / "run" / "report.html").read_text() == "earlier"


def test_a_report_that_cannot_be_written_does_no_harm(inputs, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise ValueError("no\nroom")

    monkeypatch.setattr(run, "write_report", fail)
    assert len(train(tmp_path / "run", inputs, *BONE)) == 6
    assert "note: report.html was not written: ValueError: no room\n" in capsys.readouterr().err
