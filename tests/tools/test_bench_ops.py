"""tools/bench_ops.py: what one measurement waits for, and where it runs. No timing is judged here."""

import pytest
import torch

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.errors import UserError

TINY = ModelConfig(n_layer=2, n_embd=128, vocab_size=100).resolved()


@pytest.fixture
def bench_ops(load_tool):
    return load_tool("bench_ops")


def test_every_run_is_waited_for_and_starts_on_an_idle_device(bench_ops):
    log = []
    cases = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    times = bench_ops.interleaved(cases, runs=2, finish=lambda: log.append("."))
    assert "".join(log) == 3 * ".a..b."
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("suite", ["block", "wkv6"])
def test_suites_lie_on_the_device_they_are_made_under(bench_ops, suite):
    """Meta stands in for a GPU: an operation with a tensor of the CPU would raise."""
    with torch.device("meta"):
        cases = bench_ops.SUITES[suite](TINY, 16, torch.bfloat16)
    for name, case in cases.items():
        if name != "native":  # has no meta device
            case()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_one_clear_line(bench_ops):
    with pytest.raises(UserError, match="--device cuda: this PyTorch sees no CUDA device"):
        bench_ops.main(["--device", "cuda"])
