"""The inputs of the demo: a small base model that has read Python's library, and a data set to fine-tune it on."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from demo import corpus

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo" / "out"
BASE = OUT / "base.pth"
TOKENIZER = OUT / "tokenizer.json"
CHAT, VALIDATION = OUT / "chat", OUT / "validation"
PROBLEMS, VALIDATION_PROBLEMS = 2000, 100

FINE_TUNE: Mapping[str, object] = {
    "load_model": str(BASE),
    "data_file": str(CHAT),
    "dataload": "pad",
    "ctx_len": 384,
    "micro_bsz": 8,
    "epoch_steps": 180,
    "lr_init": 8e-3,
    "lr_final": 5e-4,
    "warmup_steps": 10,
}
"""Flags of the fine-tune. The learning rates suit a tiny model; for the public models, start from 2e-5."""

SHAPE: Mapping[str, int] = {"n_layer": 4, "n_embd": 256, "vocab_size": corpus.VOCAB_SIZE}
"""Shape of the base model."""

PRETRAIN = (
    f"--n_layer {SHAPE['n_layer']} --n_embd {SHAPE['n_embd']} --ctx_len 256 --micro_bsz 8 --epoch_steps 220 "
    "--lr_init 3e-3 --lr_final 3e-4 --warmup_steps 20 --adam_eps 1e-18"
)


def make_inputs() -> None:
    """Write the texts, convert them to binidx, and train the small base model."""
    OUT.mkdir(parents=True, exist_ok=True)
    base_texts = list(corpus.python_texts())
    problems = list(corpus.math_problems(PROBLEMS + VALIDATION_PROBLEMS, seed=1))
    unseen = [text for text in problems[PROBLEMS:] if text not in set(problems[:PROBLEMS])]
    corpus.write_jsonl(base_texts, OUT / "base.jsonl")
    corpus.write_jsonl(problems[:PROBLEMS], CHAT.with_suffix(".jsonl"))
    corpus.write_jsonl(unseen, VALIDATION.with_suffix(".jsonl"))
    corpus.train_tokenizer(base_texts, TOKENIZER)
    for name in ("base", "chat", "validation"):
        jsonl, prefix = OUT / f"{name}.jsonl", OUT / name
        python("tools/json2binidx.py", "--input", jsonl, "--output_prefix", prefix, "--tokenizer", TOKENIZER)
    pretrained = OUT / "pretrain"
    python("train.py", "--data_file", OUT / "base", "--proj_dir", pretrained, *PRETRAIN.split())
    (pretrained / "rwkv-0.pth").rename(BASE)


def python(script: str, *arguments: object) -> None:
    """Print a command and run it as a user would; raise CalledProcessError if it fails."""
    words = [script, *(_shown(argument) for argument in arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def _shown(argument: object) -> str:
    """Return an argument as text; a path inside the project becomes relative to it."""
    path = Path(str(argument))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(argument)
