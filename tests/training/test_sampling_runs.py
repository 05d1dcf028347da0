"""Runs with each kind of rows, and how the startup summary describes the data."""

from __future__ import annotations

import pytest

from rwkv_peft.config.sections import DataConfig, ModelConfig, RunConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.rows.sampling import Samples, make_plan
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.training.metrics.startup_summary import startup_summary
from tests.training.small_runs import SHAPE, TEXTS, train, write_inputs

BONE = ["--peft", "bone", "--bone_config", '{"r":16}']


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ("--dataload pack --ctx_len 96 --micro_bsz 2", None),
        ("--dataload only --micro_bsz 1 --loss_mask qa", None),
        ("--dataload walk --micro_bsz 4", 4 * 48),
    ],
)
def test_a_run_with_each_kind_of_rows(tmp_path, flags, tokens):
    rows = train(tmp_path / "run", write_inputs(tmp_path), *BONE, *flags.split(), "--epoch_steps", "3")
    assert len(rows) == 3
    assert all(0 < row["loss"] < 10 for row in rows)
    assert all(row["tokens"] == tokens or tokens is None for row in rows)


def test_a_run_over_two_pairs(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    inputs, other = write_inputs(tmp_path), write_inputs(tmp_path / "other")
    words = [*inputs[:2], "--data_file", f"{inputs[3]}:0.7", f"{other[3]}:0.3"]
    assert len(train(tmp_path / "run", words, *BONE, "--epoch_steps", "2")) == 2
    assert f"data    {inputs[3]}:0.7 {other[3]}:0.3: {2 * len(TEXTS)} documents" in capsys.readouterr().out


def summary_of(tmp_path, **settings) -> str:
    prefix = write_inputs(tmp_path)[3]
    config = RunConfig(model=SHAPE, data=DataConfig(data_file=prefix, ctx_len=48, **settings))
    plan = make_plan(Samples(BinidxReader(prefix), config.data, SHAPE.vocab_size), config.data, world_size=1)
    return startup_summary(config, model_on_meta(ModelConfig(**vars(SHAPE)), dtype=None), plan, None, None)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataload": "walk"}, "walk: a pass is 71 windows of 48 tokens, 89.61% of the data"),
        ({"dataload": "pad"}, "padded: 20% of each row is padding, 0 documents truncated"),
        ({"dataload": "pack"}, "packed: 96 rows, 82.6% of their tokens used"),
        ({"dataload": "only", "micro_bsz": 1}, "one document per row without padding, at most 48 tokens"),
        ({"loss_mask": "qa"}, "loss mask qa: all 96 documents have tokens in the loss"),
    ],
)
def test_the_startup_summary_describes_the_rows(tmp_path, settings, line):
    assert line in summary_of(tmp_path, **settings)


@pytest.mark.parametrize(("epoch_steps", "notes"), [(0, 0), (24, 0), (25, 1)])
def test_epochs_longer_than_the_data_are_noted_once(tmp_path, epoch_steps, notes):
    lines = summary_of(tmp_path, dataload="pad", micro_bsz=4, epoch_steps=epoch_steps, epoch_count=2)
    assert lines.count("note: ") == notes
    assert ("an epoch of 25 batches is 1.04 passes over the data" in lines) == bool(notes)
