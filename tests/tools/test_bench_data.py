"""tools/bench_data.py: the simple loop used for comparison writes the same files. Timings are not checked."""

import json
import re
import sys

import numpy as np
import pytest

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.data.tokenizer import WorldTokenizer


@pytest.fixture
def bench_data(load_tool):
    return load_tool("bench_data")


@pytest.mark.parametrize("corpus", ["english", "multilingual"])
def test_both_write_what_megatron_writes(bench_data, tmp_path, corpus):
    texts = list(bench_data.CORPORA[corpus](100_000))
    assert sum(len(text.encode()) for text in texts) >= 100_000
    source, slow, fast = (str(tmp_path / name) for name in ("a.jsonl", "slow", "fast"))
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    bench_data.plain_loop(source, slow, bench_data.load_trie())
    bench_data.ours(source, fast, WorldTokenizer())
    assert bench_data.same_files(slow, fast)
    np.fromfile(slow + ".bin", "<u2")[:-1].tofile(slow + ".bin")
    assert not bench_data.same_files(slow, fast)


def test_multilingual_text_has_many_scripts(bench_data, monkeypatch, tmp_path):
    """Also on a machine without message catalogs, or with damaged ones."""
    (tmp_path / "bad.mo").write_bytes(b"no catalog")
    monkeypatch.setattr(bench_data, "CATALOGS", tmp_path)
    text = "".join(bench_data.multilingual(300_000))
    for first, last in ("az", "ая", "一龥", "가힣", "اي"):
        assert any(first <= letter <= last for letter in text)


def test_it_prints_the_limiting_stage_and_the_rate_of_batches(bench_data, capsys, monkeypatch):
    rows = sys.modules["bench_rows"]
    monkeypatch.setattr(rows, "MODEL", ModelConfig(n_layer=1, n_embd=128, vocab_size=257))
    small = "--documents 60 --ctx_len 64 --batches 3 --steps 1".split()
    bench_data.main(["--megabytes", "0.05", "--runs", "1", *small])
    printed = capsys.readouterr().out
    assert all(f"  {mode:<5} " in printed for mode in rows.MODES)
    assert float(re.search(r"pack: x([\d.]+) of the speed of pad", printed)[1]) > 0
    assert printed.count("limits") == len(bench_data.CORPORA)
    assert all(f"{stage} " in printed for stage in ("read", "parse", "tokenize", "pack", "write"))
