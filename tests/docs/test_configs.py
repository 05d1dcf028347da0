"""The example configurations in configs/ pass `--dry_run`, and those named after a 24 GB card fit on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import train
from rwkv_peft.config.sections import PUBLIC_SHAPES, ModelConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.model.init import large_matrices, model_on_meta
from rwkv_peft.training.metrics import startup_summary

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
CARD = 24e9
RESERVED = 2e9
"""Bytes of the card left for the CUDA context, kernels' workspaces, and the allocator's fragmentation."""


def shape_of_base(path: Path) -> ModelConfig:
    """The shape of the public model that an example names."""
    file_name = yaml.safe_load(path.read_text(encoding="utf-8"))["load_model"]
    size = {"1B6": "1.6B", "3B": "3B", "7B": "7B"}[file_name.removeprefix("RWKV-x060-World-").split("-")[0]]
    layers, width = PUBLIC_SHAPES[size]
    return ModelConfig(n_layer=layers, n_embd=width, vocab_size=65536).resolved()


@pytest.fixture
def expected(monkeypatch) -> list:
    """Collects the memory estimates of a run, and skips the search for flags that need less memory."""
    estimates, expect = [], startup_summary.expect

    def collect(config, base):
        estimates.append(expect(config, base))
        return estimates[-1]

    monkeypatch.setattr(startup_summary, "expect", collect)
    monkeypatch.setattr(startup_summary, "free_bytes", lambda device: 2**50)
    return estimates


def test_there_are_examples():
    assert len(CONFIGS) == 7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_passes_a_dry_run(path, tmp_path, capsys, expected):
    """The base file is replaced by its shape, the data by short documents."""
    with BinidxWriter(str(tmp_path / "pair"), load_tokenizer("world")) as writer:
        for length in [40, 90] * 200:
            writer.add_document([1] * length)
    shape = shape_of_base(path)
    words = ["--config", str(path), "--dry_run", "--accelerator", "cpu", "--load_model", ""]
    words += ["--data_file", str(tmp_path / "pair"), "--vocab_size", str(shape.vocab_size)]
    words += ["--n_layer", str(shape.n_layer), "--n_embd", str(shape.n_embd)]
    train.main(words)
    printed = "".join(capsys.readouterr())
    assert "trainable" in printed
    assert "no effect" not in printed
    if "24gb" in path.stem:
        model = model_on_meta(shape)
        matrices = large_matrices(model)
        in_bf16 = 2 * sum(p.numel() for name, p in model.named_parameters() if name in matrices)
        (run,) = expected  # without a file, the base is created in fp32; the public files are in bf16
        assert run.weights - in_bf16 + run.optimizer + run.step < CARD - RESERVED
