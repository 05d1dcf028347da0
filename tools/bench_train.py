"""Trains a few steps with each method, as in the paper's Table 7: tokens/s and peak memory, relative to LoRA.

Every run is a separate process, because a process has only one peak of memory, and the methods take turns. The weights
are random and stored in --precision. Nothing is read or saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.sections import PUBLIC_SHAPES, ModelConfig, OptimConfig, PeftConfig, RunConfig
from rwkv_peft.errors import UserError, exit_with_message
from rwkv_peft.memory.allocator import keep_freed_pages
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import targeted
from rwkv_peft.peft.registry import method_config
from rwkv_peft.training.optim.initial_gradients import mean_gradients
from rwkv_peft.training.optim.lisa import BlockFreezer
from rwkv_peft.training.optim.optimizer import build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LORA = "LoRA"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    peft: str = "bone"
    options: Mapping[str, Any] = field(default_factory=dict)
    grad_cp: bool = False
    paper: str = ""
    """Speed and memory relative to LoRA in the paper's Table 7 (RWKV-6 1.6B, one 4090), if it has this row."""
    quant: str = "none"


def bone(mode: str, grad_cp: bool = False, paper: str = "", **options: Any) -> Case:
    return Case("bone", {"r": 64, "mode": mode, **options}, grad_cp, paper)


CASES = {
    LORA: Case("lora", {"r": 32}, paper="1.00, 1.00"),
    "LoRA + model checkpoint": Case("lora", {"r": 32}, True),
    "Bone row": bone("row"),
    "Bone row + model checkpoint": bone("row", True),
    "Bone left": bone("left"),
    "Bone left + model checkpoint": bone("left", True),
    "Bone col": bone("col"),
    "Bone col + model checkpoint": bone("col", True),
    "row materialized": bone("row", impl="materialized"),
    "row materialized + bone checkpoint": bone("row", impl="materialized", cp=1),
    "col materialized": bone("col", paper="0.70, 1.68", impl="materialized"),
    "col materialized + bone checkpoint": bone("col", paper="0.59, 1.01", impl="materialized", cp=1),
    "col materialized + model checkpoint": bone("col", True, paper="0.27, 1.01", impl="materialized"),
    "Hugging Face bat": Case("bat", {"r": 64}),
}


def build_model(config: ModelConfig, case: Case, dtype: torch.dtype, device: str) -> RWKV6:
    """Return a model with random weights and the case's adapter."""
    model = model_on_meta(config)
    model.dtype, model.grad_cp = dtype, case.grad_cp
    model = model.to(dtype).to_empty(device=device)
    noise = torch.randn(2**20, dtype=dtype, device=device) * 0.02  # repeated for all parameters: fast
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
            if name.endswith("time_decay"):
                parameter.sub_(3)  # decays as in a trained model, not all near exp(-1)
    if case.peft == "bat":
        add_peer(model, case.options["r"])
    else:
        peft = PeftConfig(method=method_config(case.peft, case.options), quant=case.quant)
        add_adapter(model, peft, gradients=gradients(model, peft))
    return model


def gradients(model: RWKV6, peft: PeftConfig) -> Mapping[str, torch.Tensor] | None:
    """Return the gradients that LoRA-GA needs, from one batch of 64 random tokens; None for other methods."""
    if not peft.method.gradient_samples:
        return None
    ids = torch.randint(model.config.vocab_size, (1, 65), device=model.emb.weight.device)
    targets = ids[:, 1:]
    batch = {"input_ids": ids[:, :-1], "targets": targets, "loss_mask": torch.ones_like(targets, dtype=torch.bool)}
    return mean_gradients(model, targeted(model, peft.method, peft.peft_targets), [batch])


def add_peer(model: RWKV6, r: int) -> None:
    """Add Hugging Face PEFT's Bone layer in its `bat` form, which is col."""
    from peft.tuners.bone.layer import BoneLinear

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.blocks:
        for part in (block.att, block.ffn):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, BoneLinear(module, "default", r=r, init_weights="bat"))


def measure(args: argparse.Namespace, case: Case) -> dict[str, float]:
    """Run one case in this process. Return the seconds of each counted step and of the start-up, and memory in MiB."""
    dtype = DTYPES[args.precision]
    if args.keep_pages:
        keep_freed_pages()
    torch.manual_seed(0)
    began = time.perf_counter()
    model = build_model(shape(args), case, dtype, args.device)
    start = time.perf_counter() - began
    optimizer = build_optimizer(model, OptimConfig(lr_init=1e-5), by_block=case.peft == "lisa")
    if case.peft == "lisa":
        config = RunConfig(model=model.config, peft=PeftConfig(method=method_config(case.peft, case.options)))
        BlockFreezer(config).apply(model.blocks, optimizer, step=0)
    ids = torch.randint(args.vocab, (1, args.tokens + 1), device=args.device)
    mask = torch.ones(1, args.tokens, dtype=torch.bool, device=args.device)

    def step() -> None:
        hidden, _ = model.hidden(ids[:, :-1])
        model.loss(hidden, ids[:, 1:], mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    reset_peak(args.device)
    finish = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    kept = kept_bytes(model, step)  # also warms up
    finish()
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        step()
        finish()
        seconds.append(time.perf_counter() - began)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = {"peak": peak_bytes(args.device) / 2**20, "kept": kept / 2**20}
    return {"seconds": seconds, "start": start, "trained": trained, **memory}


def kept_bytes(model: nn.Module, step: Any) -> int:
    """Run a step, and return the bytes that autograd saves for backward. Parameters do not count."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Return the peak of the allocator on a GPU, or of the process on a CPU, including weights."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def shape(args: argparse.Namespace) -> ModelConfig:
    layers, width = PUBLIC_SHAPES[args.shape]
    return ModelConfig(n_layer=args.layers or layers, n_embd=width, vocab_size=args.vocab).resolved()


def run_apart(program: str, args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run `measure` in a new process."""
    command = [sys.executable, program, "--case", case, "--steps", str(args.steps), "--tokens", str(args.tokens)]
    command += ["--shape", args.shape, "--layers", str(args.layers), "--vocab", str(args.vocab)]
    command += ["--precision", args.precision, "--device", args.device]
    command += ["--keep_pages"] if args.keep_pages else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"benchmark of {case}", (done.stderr.strip().splitlines() or ["killed: out of memory?"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def product_rate(dtype: torch.dtype, width: int, tokens: int) -> float:
    """Return the FLOP/s of a plain torch product with the size of one layer: the fastest of several."""
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(width, width).to(dtype)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        x @ weight.mT
        seconds.append(time.perf_counter() - began)
    return 2 * tokens * width * width / min(seconds)


def lora_flops(config: ModelConfig, tokens: int, r: int) -> float:
    """Return the FLOPs of LoRA's products in a step: W for y and x's gradient, A and B for y and both gradients."""
    c, f = config.n_embd, config.dim_ffn
    sizes = [(c, c)] * 6 + [(f, c), (c, f)]
    block = sum(4 * rows * columns + 6 * r * (rows + columns) for rows, columns in sizes)
    return tokens * (config.n_layer * block + 4 * c * config.vocab_size)


Results = Mapping[str, list[dict[str, Any]]]
"""The measurements of every run of every case. The table compares all cases with the first."""


def print_table(args: argparse.Namespace, results: Results, heading: str, last: Callable[[str], str]) -> None:
    """Print speed and memory of every case. The last column is `last(case)` with the title `heading`."""

    def middle(case: str, key: str) -> float:
        return statistics.median(run[key] for run in results[case])

    base = next(iter(results))
    print(f"{'':<36} {'tokens/s (slowest to fastest)':>30}  speed  peak MiB  memory  kept MiB  {heading}")
    for case, runs in results.items():
        rates = sorted(args.tokens / seconds for run in runs for seconds in run["seconds"])
        ratio = statistics.median(rates) / statistics.median(
            args.tokens / seconds for run in results[base] for seconds in run["seconds"]
        )
        spread = f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"
        memory = middle(case, "peak") / middle(base, "peak")
        print(
            f"{case:<36} {spread:>30}  x{ratio:.3f}  {middle(case, 'peak'):8.0f}  x{memory:.3f}  "
            f"{middle(case, 'kept'):8.0f}  {last(case)}"
        )


def parse_args(argv: Sequence[str], cases: Mapping[str, Case], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--shape", choices=PUBLIC_SHAPES, default="0.1B", help="Public model size [0.1B].")
    parser.add_argument("--layers", type=int, default=0, help="Number of layers; 0: all layers of the shape [0].")
    parser.add_argument("--vocab", type=int, default=65536, help="Rows of embedding and head [65536].")
    parser.add_argument("--tokens", type=int, default=512, help="Tokens per step, in one sequence [512].")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="Processes per case, which take turns [3].")
    parser.add_argument("--steps", type=int, default=1, help="Measured steps per process, after a warm-up step [1].")
    parser.add_argument(
        "--only", nargs="+", metavar="GLOB", default=["*"], help="Run only LoRA and the cases that match."
    )
    parser.add_argument("--keep_pages", action="store_true", help="Keep freed memory, as train.py does (CPU only).")
    parser.add_argument("--json", metavar="FILE", help="Also write all measurements to FILE.")
    parser.add_argument("--case", choices=cases, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_cases(program: str, args: argparse.Namespace, cases: Mapping[str, Case]) -> Results | None:
    """Run the selected cases in turn. Return None if this process runs one case only, whose results it has printed."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda", "PyTorch finds no CUDA device", hint="Omit the flag to use the CPU.")
    if args.case:
        print(json.dumps(measure(args, cases[args.case])))
        return None
    chosen = [case for case in cases if case == LORA or any(fnmatchcase(case, glob) for glob in args.only)]
    if find_spec("peft") is None:
        chosen = [case for case in chosen if cases[case].peft != "bat"]
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in chosen}
    for _ in range(args.repeats):
        for case in chosen:
            results[case].append(run_apart(program, args, case))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    pages = ", pages kept" if args.keep_pages else ""
    print(f"\n{args.shape}, {shape(args).n_layer} layers, {args.precision}, {args.tokens} tokens, {place}{pages}")
    return results


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv, CASES, __doc__)
    results = run_cases(__file__, args, CASES)
    if results is None:
        return
    print_table(args, results, "paper: speed, memory", lambda case: CASES[case].paper)
    if args.device == "cpu":
        rate = max(product_rate(dtype, shape(args).n_embd, args.tokens) for dtype in DTYPES.values())
        middle = statistics.median(seconds for run in results[LORA] for seconds in run["seconds"])
        share = lora_flops(shape(args), args.tokens, CASES[LORA].options["r"]) / rate / middle
        print(f"LoRA trains at {share:.0%} of the speed that its products alone would have ({rate / 1e9:.0f} GFLOP/s)")


if __name__ == "__main__":
    exit_with_message(main)
