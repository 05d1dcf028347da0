"""tools/bench_ops.py: synchronization and devices. Timings are not checked."""

import pytest
import torch

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.errors import UserError

TINY = ModelConfig(n_layer=2, n_embd=128, vocab_size=100).resolved()


@pytest.fixture
def bench_ops(load_tool):
    return load_tool("bench_ops")


def test_the_device_is_idle_before_and_after_every_run(bench_ops):
    log = []
    cases = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    times = bench_ops.interleaved(cases, runs=2, finish=lambda: log.append("."))
    assert "".join(log) == 3 * ".a..b."
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("suite", ["block", "wkv6"])
def test_suites_use_the_default_device(bench_ops, suite):
    """The meta device replaces a GPU: an operation with a CPU tensor would raise an error."""
    with torch.device("meta"):
        cases = bench_ops.SUITES[suite](TINY, 16, torch.bfloat16)
    for name, case in cases.items():
        if name != "native":  # does not support the meta device
            case()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_gives_a_one_line_error(bench_ops):
    with pytest.raises(UserError, match="--device cuda: PyTorch finds no CUDA device"):
        bench_ops.main(["--device", "cuda"])
