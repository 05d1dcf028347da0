"""The starter model and data that training uses if neither a model nor data is given.

Everything is made on first use, from files that every Python installation has: a small base model that has read
Python's documentation, and arithmetic questions to fine-tune it on. The tokenizer is `bytes`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_peft.console import note, say
from rwkv_peft.errors import UserError

FOLDER = Path("starter")
"""In the working folder."""
BASE, QUESTIONS = FOLDER / "base.pth", FOLDER / "questions"

SHAPE: Mapping[str, int] = {"n_layer": 4, "n_embd": 128, "vocab_size": 257}
"""The base model's shape; 257 is the vocabulary of the `bytes` tokenizer."""

PRETRAIN: Mapping[str, Any] = {
    "ctx_len": 256,
    "micro_bsz": 8,
    "epoch_steps": 250,
    "lr_init": 6e-3,
    "lr_final": 6e-4,
    "warmup_steps": 20,
    "adam_eps": 1e-18,
}
"""Settings of the base model's training."""

FINE_TUNE: Mapping[str, Any] = {
    "load_model": str(BASE),
    "data_file": (str(QUESTIONS),),
    "dataload": "pad",
    "ctx_len": 160,
    "micro_bsz": 16,
    "epoch_steps": 150,
    "lr_init": 8e-3,
    "lr_final": 8e-4,
    "warmup_steps": 10,
}
"""Default settings of the fine-tune. The learning rates suit a very small model."""


def with_starter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the starter model and data as defaults; make both if they do not exist.

    With `--dry_run` nothing is made: the settings then have the shape of the starter model.

    Raises:
        UserError: the model does not exist, and several processes were launched, each of which would make it.
    """
    note(f"no --load_model and no --data_file: using the small starter model and arithmetic questions in {FOLDER}/")
    exists = BASE.exists() and QUESTIONS.with_suffix(".idx").exists()
    if settings.get("dry_run") and not exists:
        return {**SHAPE, **settings}
    if not exists:
        if {"RANK", "SLURM_PROCID"} & set(os.environ):
            hint = "Start train.py once without a launcher, or give --load_model and --data_file."
            raise UserError(str(BASE), "missing; a single process must make the starter model", hint=hint)
        say("making the starter model and data first (about a minute)")
        make_starter(FOLDER)
    return {**FINE_TUNE, **settings}


def make_starter(folder: Path) -> None:
    """Write the data and train the base model, in a new folder that is renamed to `folder` at the end."""
    from rwkv_peft.data.convert.conversion import Options, convert
    from rwkv_peft.data.convert.record_text import RecordFormat
    from rwkv_peft.data.tokenizer import load_tokenizer
    from rwkv_peft.run_config import config_from_settings
    from rwkv_peft.training.run import train

    began = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json_lines(partial / "text.jsonl", ({"text": text} for text in texts()))
    write_json_lines(partial / "questions.jsonl", questions(3000))
    for name, val_fraction in (("text", 0.0), ("questions", 0.03)):
        options = Options(val_fraction=val_fraction, workers=1)
        convert([str(partial / f"{name}.jsonl")], str(partial / name), load_tokenizer("bytes"), RecordFormat(), options)
    folders = {"data_file": (str(partial / "text"),), "proj_dir": str(partial / "run")}
    train(config_from_settings({**SHAPE, **PRETRAIN, **folders}))
    os.environ.pop("PL_GLOBAL_SEED", None)  # Lightning's seed of this run; the next run has its own
    (partial / "run" / "rwkv-0.pth").rename(partial / BASE.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    say(f"made the starter model and data in {time.monotonic() - began:.0f} s: {folder / BASE.name}\n")


def texts() -> Iterator[str]:
    """Yield Python's language documentation by topic, about 0.7 MB."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def questions(count: int, seed: int = 1) -> Iterator[dict[str, str]]:
    """Yield different arithmetic questions with worked answers, as instruction records."""
    generator = random.Random(seed)
    seen: set[str] = set()
    names, things = "Ann Ben Eva Leo Mia Tom".split(), "apples books cards eggs pens stamps".split()
    while len(seen) < count:
        name, thing = generator.choice(names), generator.choice(things)
        a, b = sorted(generator.sample(range(2, 20), 2))
        if generator.random() < 0.5:
            question = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
            answer = f"{a} + {b} = {a + b}. {name} has {a + b} {thing}."
        else:
            question = f"{name} has {b} {thing} and gives away {a}. How many {thing} are left?"
            answer = f"{b} - {a} = {b - a}. {name} has {b - a} {thing} left."
        if question not in seen:
            seen.add(question)
            yield {"instruction": question, "output": answer}


def write_json_lines(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
