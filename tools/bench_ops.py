"""Times operators and their alternatives, interleaved in one process, and prints medians, spread and ratios."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

import torch
from torch import Tensor, nn

from rwkv_peft.config.sections import PUBLIC_SHAPES, ModelConfig
from rwkv_peft.errors import UserError, exit_with_message
from rwkv_peft.memory.allocator import keep_freed_pages
from rwkv_peft.model.rwkv6 import Block
from rwkv_peft.model.state import first_state
from rwkv_peft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from rwkv_peft.ops.mix import op as mix
from rwkv_peft.ops.mix import reference as mix_reference
from rwkv_peft.ops.wkv6.fla import load_fla
from rwkv_peft.ops.wkv6.op import wkv6
from rwkv_peft.peft.injection import inject
from rwkv_peft.peft.registry import method_config

METHODS = {
    "LoRA r=32": ("lora", {"r": 32}),
    "Bone row": ("bone", {"r": 64}),
    "Bone row, stochastic": ("bone", {"r": 64, "rounding": "stochastic"}),
    "Bone left": ("bone", {"r": 64, "mode": "left"}),
    "Bone left, stochastic": ("bone", {"r": 64, "mode": "left", "rounding": "stochastic"}),
    "Bone col": ("bone", {"r": 64, "mode": "col"}),
}


def interleaved(
    cases: Mapping[str, Callable[[], None]], runs: int, finish: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds of every run of every case. The cases take turns, after one warm-up round.

    `finish` waits for the device, because a GPU may still be working on earlier calls.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 1):
        for name, case in cases.items():
            finish()
            began = time.perf_counter()
            case()
            finish()
            if run:
                times[name].append(time.perf_counter() - began)
    return times


def block_cases(config: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return forward and backward of one block with an adapter on all eight linear layers, for each method."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, config.n_embd).to(dtype).requires_grad_()
    grad, state = torch.randn_like(x), first_state(config, 1, x.device, dtype)[0]

    def case(method: str, options: dict) -> Callable[[], None]:
        block = Block(config, layer=1)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        block = block.to(dtype)
        inject(block, method_config(method, options))
        return lambda: _step(block(x, state)[0], grad, x, block)

    return {name: case(*method) for name, method in METHODS.items()}


def _step(y: Tensor, grad: Tensor, x: Tensor, block: nn.Module) -> None:
    y.backward(grad)
    x.grad = None
    block.zero_grad()


def wkv_cases(config: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return forward and backward of WKV6 with gradients of all six inputs, for each backend."""
    torch.manual_seed(0)
    size = (1, tokens, config.n_head, config.head_size)
    r, k, v = (torch.randn(size).to(dtype).requires_grad_() for _ in range(3))
    w = (torch.randn(size) - 3).requires_grad_()
    u = torch.randn(size[2:]).requires_grad_()
    state = torch.randn(1, config.n_head, config.head_size, config.head_size).requires_grad_()
    inputs, grads = (r, k, v, w, u, state), (torch.randn(size).to(dtype), torch.randn(state.shape))

    def case(backend: str) -> Callable[[], None]:
        return lambda: torch.autograd.grad(wkv6(*inputs, backend=backend), inputs, grads)

    backends = ["reference", "torch", "native"]
    if load_fla(r.device.type) is None:
        backends.append("fla")
    return {backend: case(backend) for backend in backends}


def wkv_flops(config: ModelConfig, tokens: int) -> int:
    """Return the FLOPs of one forward and backward by the recurrence's definition (cuda/wkv6/wkv6_call.h).

    Per token and head, these are 16 N^2: 5 forward (read 2, decay 1, write 2) and 11 backward (decay 1, write 2, and 2
    each for the gradients of r, k, v and the decay).
    """
    return 16 * tokens * config.n_head * config.head_size**2


def fma_peak() -> float:
    """Return the GFLOP/s of fused multiply-adds in registers on all of PyTorch's threads (cuda/fma_peak.cpp)."""
    source = Path(__file__).resolve().parents[1] / "cuda" / "fma_peak.cpp"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/fma_peak"
        flags = ["-O3", "-march=native", "-fopenmp"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", program], check=True)
        env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        return float(subprocess.run(program, env=env, check=True, capture_output=True, text=True).stdout)


def loss_cases(config: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return forward and backward of head and loss, fused and by the definition."""
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, config.n_embd).to(dtype).requires_grad_()
    weight = (torch.randn(config.vocab_size, config.n_embd) / config.n_embd**0.5).to(dtype)
    targets, mask = torch.randint(config.vocab_size, (1, tokens)), torch.ones(1, tokens, dtype=torch.bool)
    return {
        "definition": lambda: masked_cross_entropy(hidden @ weight.T, targets, mask).backward(),
        "fused": lambda: linear_cross_entropy(hidden, weight, targets, mask).backward(),
    }


def mix_cases(config: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return forward and backward of a block's element-wise steps, together and one by one, compiled and plain."""
    torch.manual_seed(0)
    width, rank, decay_rank = config.n_embd, config.time_mix_rank, config.time_decay_rank

    def normal(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape)).to(dtype)

    x, gate, k = (normal(1, tokens, size).requires_grad_() for size in (width, width, config.dim_ffn))
    last, norm, maa = torch.zeros(1, width, dtype=dtype), (normal(width), normal(width)), normal(5, width)
    operations = {
        "ddlerp": (x, last, maa[0], normal(width, 5 * rank), maa, normal(5, rank, width)),
        "shift_lerp": (x, last, maa[:2]),
        "decay": (x, maa[0], normal(width, decay_rank), normal(decay_rank, width)),
        "gated_norm": (x, gate, *norm, config.n_head, 64e-5),
        "relu_square": (k,),
    }

    def case(names: Sequence[str], module: ModuleType) -> Callable[[], None]:
        def run() -> None:
            for name in names:
                outputs = getattr(module, name)(*operations[name])
                torch.autograd.backward(outputs, [*outputs] if isinstance(outputs, tuple) else outputs)
                x.grad = gate.grad = k.grad = None

        return run

    parts = {"all": tuple(operations), **{name: (name,) for name in operations}}
    forms = {"plain": mix_reference, "compiled": mix}
    return {f"{part}, {form}": case(names, forms[form]) for part, names in parts.items() for form in forms}


SUITES = {"block": block_cases, "wkv6": wkv_cases, "loss": loss_cases, "mix": mix_cases}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench_ops.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument(
        "--shape", choices=PUBLIC_SHAPES, default="1.6B", help="Public model size, for the width [1.6B]."
    )
    parser.add_argument("--tokens", type=int, default=512, help="Tokens, in one sequence [512].")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Device of the operators [cpu].")
    parser.add_argument("--runs", type=int, default=7, help="Measured runs per case [7].")
    parser.add_argument("--keep_pages", action="store_true", help="Keep freed memory, as train.py does (CPU only).")
    parser.add_argument("--json", metavar="FILE", help="Also write all times to FILE.")
    return parser.parse_args(argv)


def device_line(device: str) -> str:
    """Return a description of the device.

    Raises:
        UserError: the device is cuda and there is no GPU.
    """
    if device == "cpu":
        return f"{torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        what = "PyTorch finds no CUDA device"
        raise UserError("--device cuda", what, hint="This needs a GPU, its driver and a CUDA build of PyTorch.")
    return torch.cuda.get_device_name()


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    device = device_line(args.device)
    if args.keep_pages:
        keep_freed_pages()
        device += ", pages kept"
    finish = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    n_layer, n_embd = PUBLIC_SHAPES[args.shape]
    config = ModelConfig(n_layer=n_layer, n_embd=n_embd).resolved()
    results: dict[str, dict[str, list[float]]] = {}
    for suite in args.suite:
        for name in args.dtype:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
            with torch.device(args.device):  # the default device of the tensors that the suites create
                cases = SUITES[suite](config, args.tokens, dtype)
            times = interleaved(cases, args.runs, finish)
            results[f"{suite} {name}"] = times
            base = statistics.median(next(iter(times.values())))
            print(f"\n{suite}, {name}, width {n_embd}, {args.tokens} tokens, {device}")
            for case, seconds in times.items():
                low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
                print(
                    f"  {case:<22} {middle * 1e3:8.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})  x{base / middle:.3f}"
                )
            if suite == "wkv6" and args.device == "cpu":
                rate, peak = wkv_flops(config, args.tokens) / statistics.median(times["native"]) / 1e9, fma_peak()
                print(f"  native: {rate:.0f} GFLOP/s of the {peak:.0f} of fused multiply-adds, {rate / peak:.0%}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    exit_with_message(main)
