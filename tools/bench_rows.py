"""Measures how fast each --dataload mode reads rows, and what packing gains. This is the second half of bench_data.py.

The data are English text, cut into documents with the lengths of chats (lognormal: median 300 tokens, 95 % below
1,500). The first half of each document is masked like a question, so that the mask is read too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.sections import DataConfig, ModelConfig, OptimConfig, PeftConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.training_data import open_data
from rwkv_peft.model.init import model_from_scratch
from rwkv_peft.peft.methods.bone import BoneConfig
from rwkv_peft.training.optim.optimizer import build_optimizer

MODES = ("get", "walk", "pad", "only", "pack")
MEDIAN, SPREAD = 300, np.log(5) / 1.645
"""Median length in tokens, and the sigma of the lognormal distribution with 95 % below five medians."""
TOKENIZER = "bytes"
"""With a small vocabulary the head is a small part of a step, as in large models."""
MODEL = ModelConfig(n_layer=6, n_embd=512, vocab_size=257)

Batches = Iterator[dict[str, Tensor]]


def write_chat_like(prefix: Path, texts: Iterator[str], documents: int) -> None:
    """Write a pair with `documents` documents, cut from the texts."""
    tokenizer, ids = load_tokenizer(TOKENIZER), []
    lengths = np.random.default_rng(0).lognormal(np.log(MEDIAN), SPREAD, documents).astype(int).clip(2)
    with BinidxWriter(prefix, tokenizer) as writer:
        for length in lengths.tolist():
            while len(ids) < length:
                ids += tokenizer.encode(next(texts))
            asked = length // 2
            writer.add_document([*ids[: length - 1], tokenizer.eod], [0] * asked + [1] * (length - asked))
            del ids[:length]


def batches(prefix: Path, mode: str, ctx_len: int, micro_bsz: int, loss_mask: str = "auto") -> Batches:
    """Yield batches without end, as one process of a run reads them."""
    config = DataConfig(
        data_file=str(prefix),
        dataload=mode,
        ctx_len=ctx_len,
        micro_bsz=1 if mode == "only" else micro_bsz,
        loss_mask=loss_mask,
    )
    data = BinidxDataModule(open_data(config), micro_batches_per_step=1)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0)
    while True:
        for step in data.train_dataloader():
            yield from step


def rates(found: Batches, count: int) -> tuple[float, float]:
    """Return batches and tokens per second, without the time to open the pair."""
    next(found)
    begun = time.perf_counter()
    tokens = sum(batch["input_ids"].numel() for batch in islice(found, count))
    seconds = time.perf_counter() - begun
    return count / seconds, tokens / seconds


def stepper() -> Callable[[dict[str, Tensor]], int]:
    """Return a function that trains Bone on one batch and returns the number of tokens in the loss."""
    model = model_from_scratch(MODEL.resolved(), seed=0)
    add_adapter(model, PeftConfig(method=BoneConfig(r=64)))
    optimizer = build_optimizer(model, OptimConfig())

    def step(batch: dict[str, Tensor]) -> int:
        hidden, _ = model.hidden(batch["input_ids"], starts=batch.get("starts"))
        model.loss(hidden, batch["targets"], batch["loss_mask"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(batch["loss_mask"].sum())

    return step


def bench_reading(prefix: Path, args: argparse.Namespace) -> None:
    print(
        f"reading: rows of {args.ctx_len} tokens, {args.micro_bsz} per batch, one process, median of {args.runs} runs"
    )
    for mode in MODES:
        found = batches(prefix, mode, args.ctx_len, args.micro_bsz)
        turns = [rates(found, args.batches) for _ in range(args.runs)]
        per_second, tokens = (statistics.median(values) for values in zip(*turns, strict=True))
        print(f"  {mode:<5} {per_second:9,.0f} batches/s  {tokens / 1e6:7.1f} M tokens/s")


def bench_packing(prefix: Path, args: argparse.Namespace) -> None:
    """Print the tokens in the loss per second for pad and pack, which take turns.

    The rate is computed over all turns, because a few padded rows have few or many tokens by chance.
    """
    step, seconds, trained = stepper(), {"pad": [], "pack": []}, {"pad": [], "pack": []}
    sources = {mode: batches(prefix, mode, args.ctx_len, args.micro_bsz, "pad") for mode in seconds}
    for turn in range(args.runs + 1):
        for mode, found in sources.items():
            begun = time.perf_counter()
            tokens = sum(step(batch) for batch in islice(found, args.steps))
            if turn:  # the first warms up
                seconds[mode].append(time.perf_counter() - begun)
                trained[mode].append(tokens)
    threads = torch.get_num_threads()
    print(f"training Bone r=64, {MODEL.n_layer} layers x {MODEL.n_embd}, {threads} threads, {args.runs} turns")
    speeds = {mode: sum(trained[mode]) / sum(seconds[mode]) for mode in seconds}
    for mode, speed in speeds.items():
        turns = [1000 * turn / args.steps for turn in seconds[mode]]
        print(f"  {mode:<5} {speed:7.0f} tokens in the loss/s  {min(turns):.0f} to {max(turns):.0f} ms per step")
    print(f"  pack: x{speeds['pack'] / speeds['pad']:.2f} of the speed of pad")
