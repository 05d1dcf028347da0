"""Prints the table of docs/training.md.

Run it with: PYTHONPATH=RWKV-PEFT python -m tests.training.distributed.strategy_table FOLDER
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from tests.training.distributed.pairs import PairRun, in_a_pair
from tests.training.distributed.test_scale import STRATEGIES, flags_of, largest_difference, write_data
from tests.training.small_runs import metrics, train_flags


def main(folder: Path) -> None:
    """Compare two processes with one of the same precision; columns: fp32 and bf16, each with grad_cp 0 and 1."""
    folder.mkdir(parents=True)
    write_data(folder)
    columns = list(product(("fp32", "bf16"), ("0", "1")))
    for precision in ("fp32", "bf16"):
        train_flags(flags_of(folder, precision, "--micro_bsz", "2", "--precision", precision))
    runs = [
        flags_of(folder, f"{strategy}-{precision}-{cp}", "--strategy", strategy, "--precision", precision,
                 "--grad_cp", cp, "--micro_bsz", "1")
        for strategy in STRATEGIES
        for precision, cp in columns
    ]  # fmt: skip
    in_a_pair([PairRun(flags) for flags in runs], folder / "runs.json")
    for strategy in STRATEGIES:
        worst = [
            largest_difference(metrics(folder / f"{strategy}-{precision}-{cp}"), metrics(folder / precision))
            for precision, cp in columns
        ]
        print(f"| `{strategy}` | " + " | ".join(f"{value:.1e}" for value in worst) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
