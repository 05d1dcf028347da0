"""A small base model, a small data set, and runs on them in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from rwkv_peft.config.sections import ModelConfig, RunConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.training_data import open_data
from rwkv_peft.run_config import config_from_argv
from rwkv_peft.training.model_setup import open_base, resolve_shape
from rwkv_peft.training.run import RunResult
from rwkv_peft.training.run import train as train_config
from tests.helpers import with_shape, write_base

SHAPE = with_shape(vocab_size=257)
TEXTS = [f"User: What is {a} plus {b}?\n\nAssistant: {a + b}." for a in range(12) for b in range(8)]
COMMON = "--dataload pad --ctx_len 48 --micro_bsz 4 --epoch_steps 6 --lr_init 1e-3 --lr_final 1e-3".split()


def write_inputs(folder: Path, shape: ModelConfig = SHAPE) -> list[str]:
    """Write a base model and data to a folder, and return the flags that name them."""
    write_base(folder / "base.pth", shape)
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(folder / "data", tokenizer) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])
    return ["--load_model", f"{folder}/base.pth", "--data_file", f"{folder}/data"]


def config_of(flags: Sequence[str]) -> RunConfig:
    """Return the configuration of train.py's flags, with the model's shape."""
    config = config_from_argv(flags)
    base = open_base(config)
    vocab_size = 0 if base or not config.data.data_file else open_data(config.data, config.model.vocab_size).vocab_size
    return resolve_shape(config, base, vocab_size)


def train_flags(flags: Sequence[str]) -> RunResult:
    """Train with the flags of train.py, in this process."""
    return train_config(config_from_argv(flags))


def train(folder: Path, inputs: Sequence[str], *more: str) -> list[dict]:
    """Train a small run in a folder and return the training steps in its metrics.jsonl.

    The memory estimate is skipped: it takes longer than such a run.
    """
    with mock.patch("rwkv_peft.training.run.announce_memory", return_value=None):
        train_flags([*inputs, *COMMON, "--proj_dir", str(folder), *more])
    return steps(folder)


def steps(folder: Path) -> list[dict]:
    """Return the training steps in metrics.jsonl of a run's folder."""
    return [row for row in metrics(folder) if "loss" in row]


def validations(folder: Path) -> list[dict]:
    """Return the validations in metrics.jsonl of a run's folder."""
    return [row for row in metrics(folder) if "val_loss" in row]


def metrics(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl of a run's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
