"""From chats in JSON to trained tokens: a run uses the mask of the converter without a flag."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rwkv_peft.config.sections import DataConfig
from rwkv_peft.data.binidx.reader import BinidxReader
from rwkv_peft.data.convert.command_line import main
from rwkv_peft.data.rows.sampling import Samples
from rwkv_peft.data.tokenizer import load_tokenizer

CHATS = [("What is 2 + 3?", "It is 5."), ("Say a colour.", "Blue, of course."), ("你好吗?", "很好。")]


@pytest.fixture
def prefix(tmp_path):
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in CHATS
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prefix = str(tmp_path / "pair")
    main(["--input", str(tmp_path / "chats.jsonl"), "--output_prefix", prefix, "--tokenizer", "world"])
    return prefix


@pytest.mark.parametrize("dataload", ["pad", "only", "pack"])
def test_only_answers_of_chats_and_instructions_are_trained(prefix, dataload):
    config = DataConfig(data_file=prefix, dataload=dataload, ctx_len=64, micro_bsz=1)
    samples, tokenizer = Samples(BinidxReader(prefix), config, 65536), load_tokenizer("world")
    trained = ""
    for index in range(samples.samples_per_pass):
        row = samples.sample(0, 0, index)
        targets = np.where(row["loss_mask"], row["targets"], -1).tolist()
        trained += "".join(tokenizer.decode([token]) if token > 0 else "|" for token in targets)
    found = sorted(answer for answer in trained.split("|") if answer)
    assert found == sorted(f" {answer}\n\n" for _, answer in CHATS)
    assert sum(samples.sample(0, 0, i)["loss_mask"].sum() for i in range(samples.samples_per_pass)) == int(
        samples.reader.mask.sum()
    )
