"""Measures how much of a small update reaches a bf16 output, for each method and dtype of products, against float64."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

import torch
from torch import Tensor

from rwkv_peft.errors import exit_with_message
from rwkv_peft.ops import products
from rwkv_peft.ops.bone.layouts import block_affine_delta, bone_col, bone_left, bone_materialized, bone_row
from rwkv_peft.ops.low_rank import lora_linear

WIDTH, ROWS, BLOCK, RANK = 1024, 4096, 64, 32
SIZES = (1e-6, 1e-5, 2e-5, 1e-4, 1e-3, 1e-2)
FORMS = {"row": bone_row, "col": bone_col, "left": bone_left}
Form = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""A function of x, W and the size of the adapter's elements. It returns y, and the true dW in float64."""


def bone_form(mode: str, stochastic: bool = False, materialized: bool = False) -> Form:
    def form(x: Tensor, weight: Tensor, size: float) -> tuple[Tensor, Tensor]:
        bone = size * torch.randn(WIDTH // BLOCK, BLOCK, BLOCK)
        bone = bone.bfloat16().float()  # exact in bf16, so that rounding the adapter is not measured
        y = bone_materialized(x, weight, bone, mode) if materialized else FORMS[mode](x, weight, bone, stochastic)
        return y, block_affine_delta(weight.double(), bone.double(), mode)

    return form


def lora_form(x: Tensor, weight: Tensor, size: float) -> tuple[Tensor, Tensor]:
    a = (torch.randn(RANK, WIDTH) / WIDTH**0.5).bfloat16().float()
    b = (size * torch.randn(WIDTH, RANK)).bfloat16().float()
    return lora_linear(x, weight, a, b, 1.0), b.double() @ a.double()


@contextmanager
def arithmetic(wide: bool) -> Iterator[None]:
    """Compute products of bf16 rows in fp32 (wide) or in bf16, on any CPU."""
    before, products._has_amx = products._has_amx, lambda: not wide
    try:
        yield
    finally:
        products._has_amx = before


def share(form: Form, size: float, draws: int) -> list[float]:
    """Return <measured update, true update> / <true update, true update> over all rows, one value per draw."""
    shares = []
    for seed in range(draws):
        torch.manual_seed(seed)
        x, weight = torch.randn(ROWS, WIDTH).bfloat16(), (torch.randn(WIDTH, WIDTH) / WIDTH**0.5).bfloat16()
        y, delta = form(x, weight, size)
        update = x.double() @ delta.mT
        arrived = y.double() - x.double() @ weight.double().mT
        shares.append(((arrived * update).sum() / update.square().sum()).item())
    return shares


CASES: dict[str, tuple[bool, Form]] = {
    "LoRA r=32, fp32 products": (True, lora_form),
    "LoRA r=32, bf16 products": (False, lora_form),
}
for _mode in FORMS:
    CASES |= {
        f"{_mode}, fp32 products": (True, bone_form(_mode)),
        f"{_mode}, bf16 products": (False, bone_form(_mode)),
        f"{_mode}, bf16 products, stochastic": (False, bone_form(_mode, stochastic=True)),
        f"{_mode}, materialized": (False, bone_form(_mode, materialized=True)),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tools/bench_rounding.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--draws", type=int, default=4, help="Number of random draws for each mean [4].")
    args = parser.parse_args(argv)
    print(f"{'size of the adapter elements':<32}", *(f"{size:>15g}" for size in SIZES))
    for name, (wide, form) in CASES.items():
        with arithmetic(wide):
            shares = [share(form, size, args.draws) for size in SIZES]
        spread = [statistics.stdev(s) if len(s) > 1 else 0.0 for s in shares]
        print(f"{name:<32}", *(f"{statistics.mean(s):7.3f} +-{d:6.3f}" for s, d in zip(shares, spread, strict=True)))


if __name__ == "__main__":
    exit_with_message(main)
