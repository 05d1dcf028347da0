"""A small base, a small data set, and a run on them in this process."""

from __future__ import annotations

import json
from pathlib import Path

from rwkv_peft.config import flags as cli
from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.training.run import run
from tests.helpers import with_shape, write_base

SHAPE = with_shape(vocab_size=257)
TEXTS = [f"User: What is {a} plus {b}?\n\nAssistant: {a + b}." for a in range(12) for b in range(8)]


def write_inputs(folder: Path, shape: ModelConfig = SHAPE) -> list[str]:
    """Flags naming a base and data that are written there."""
    write_base(folder / "base.pth", shape)
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(folder / "data", tokenizer) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])
    return ["--load_model", f"{folder}/base.pth", "--data_file", f"{folder}/data"]


def train(folder: Path, inputs: list[str], *more: str) -> list[dict]:
    """Run and return the training steps in metrics.jsonl."""
    common = "--dataload pad --ctx_len 48 --micro_bsz 4 --epoch_steps 6 --lr_init 1e-3 --lr_final 1e-3".split()
    run(cli.resolve(cli.parse_args([*inputs, *common, "--proj_dir", str(folder), *more])))
    return [row for row in metrics(folder) if "loss" in row]


def validations(folder: Path) -> list[dict]:
    """The validations in metrics.jsonl of a run's folder."""
    return [row for row in metrics(folder) if "val_loss" in row]


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl of a run's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
