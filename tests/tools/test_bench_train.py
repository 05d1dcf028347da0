"""tools/bench_train.py runs, and its accounting is right. Timings are not checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rwkv_peft.config.sections import ModelConfig

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_train.py"


def test_table_and_json(tmp_path):
    small = "--shape 0.1B --layers 1 --tokens 16 --vocab 64 --repeats 1 --keep_pages".split()
    command = [sys.executable, TOOL, *small, "--only", "Bone col", "--json", tmp_path / "figures.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0.1B, 1 layers, bf16, 16 tokens, CPU" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith(("LoRA ", "Bone"))]
    assert [line.split("  ")[0] for line in lines[:2]] == ["LoRA", "Bone col"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["LoRA", "Bone col"]
    assert all(set(runs[0]) == {"seconds", "start", "trained", "peak", "kept"} for runs in figures.values())


def test_cuda_without_a_gpu_gives_a_one_line_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = subprocess.run([sys.executable, TOOL, "--device", "cuda"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --device cuda: PyTorch finds no CUDA device")


def test_kept_bytes_counts_each_storage_once_without_parameters(load_tool):
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)

    def step():
        y = layer(x)  # keeps x (128 bytes) and the weight
        (y * y).sum().backward()  # keeps y, twice (128 bytes)

    assert load_tool("bench_train").kept_bytes(layer, step) == 256


def test_flops_of_lora(load_tool):
    """A product of N x I x O has 2 N I O FLOPs. The frozen head only computes the gradient of its input."""
    config = ModelConfig(n_layer=1, n_embd=32, vocab_size=64, head_size=32, dim_ffn=96).resolved()
    layers = 6 * (4 * 32 * 32 + 6 * 2 * 64) + 2 * (4 * 96 * 32 + 6 * 2 * 128)
    assert load_tool("bench_train").lora_flops(config, tokens=5, r=2) == 5 * (layers + 4 * 32 * 64)


def test_rounding_benchmark_measures_a_large_update_completely(load_tool):
    bench_rounding = load_tool("bench_rounding")
    with bench_rounding.arithmetic(wide=False):
        (share,) = bench_rounding.share(bench_rounding.bone_form("row"), 1e-2, draws=1)
    assert share == pytest.approx(1, abs=1e-2)
