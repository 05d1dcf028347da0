"""Measures speed, memory and start-up time of every method, relative to LoRA, with the same number of parameters.

Where possible, a method has as many trainable parameters as LoRA with r=32. Every run is a separate process, and the
methods take turns (see bench_train.py).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("RWKV-PEFT", "tools")]

from bench_train import LORA, Case, bone, parse_args, print_table, run_cases, shape

from rwkv_peft.errors import exit_with_message

CASES = {
    LORA: Case("lora", {"r": 32}),
    "bone row": bone("row"),
    "bone left": bone("left"),
    "bone col": bone("col"),
    "bone group, g=8": bone("group", g=8),
    "bone group, g=64": bone("group", g=64),
    "bone unconstrained, r=32": Case("bone", {"r": 32, "mode": "unconstrained"}),
    "bone hadamard": bone("hadamard"),
    "miss r=64": Case("miss", {"r": 64}),
    "dora r=32": Case("dora", {"r": 32}),
    "pissa r=32": Case("pissa", {"r": 32}),
    "olora r=32": Case("olora", {"r": 32}),
    "lora_ga r=32": Case("lora_ga", {"r": 32}),
    "adapter r=168": Case("adapter", {"r": 168}),
    "prompt, 20 vectors": Case("prompt", {"tokens": 20}),
    "lisa, 2 blocks": Case("lisa", {"layers": 2}),
    "none (full)": Case("none"),
    "LoRA on nf4": Case("lora", {"r": 32}, quant="nf4"),
    "bone row on nf4": Case("bone", {"r": 64}, quant="nf4"),
    "bone row on fp4": Case("bone", {"r": 64}, quant="fp4"),
    "bone row on int8": Case("bone", {"r": 64}, quant="int8"),
    "bone col on nf4": Case("bone", {"r": 64, "mode": "col"}, quant="nf4"),
    "pissa on nf4": Case("pissa", {"r": 32}, quant="nf4"),
}


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv, CASES, __doc__)
    fits = shape(args).n_embd % 1024 == 0
    cases = {name: case for name, case in CASES.items() if fits or case.options.get("g") != 64}
    results = run_cases(__file__, args, cases)
    if results is None:
        return

    def trained_and_start(case: str) -> str:
        runs = results[case]
        return f"{runs[0]['trained'] / 1e6:9.3f}  {statistics.median(run['start'] for run in runs):7.1f}"

    print_table(args, results, "trained M  start s", trained_and_start)


if __name__ == "__main__":
    exit_with_message(main)
