"""Prints the table of docs/training.md:
PYTHONPATH=RWKV-PEFT python -m tests.training.distributed.strategy_table FOLDER."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from rwkv_peft.config import flags as cli
from rwkv_peft.training.run import run
from tests.training.distributed.pairs import in_a_pair
from tests.training.distributed.test_scale import STRATEGIES, flags_of, largest_difference, metrics, write_data


def main(folder: Path) -> None:
    """Two processes against one of the same precision; columns: fp32 and bf16, each with grad_cp 0 and 1."""
    folder.mkdir(parents=True)
    write_data(folder)
    columns = list(product(("fp32", "bf16"), ("0", "1")))
    for precision in ("fp32", "bf16"):
        flags = flags_of(folder, precision, "--micro_bsz", "2", "--precision", precision)
        run(cli.resolve(cli.parse_args(flags)))
    runs = [
        flags_of(folder, f"{strategy}-{precision}-{cp}", "--strategy", strategy, "--precision", precision,
                 "--grad_cp", cp, "--devices", "2", "--micro_bsz", "1")
        for strategy in STRATEGIES
        for precision, cp in columns
    ]  # fmt: skip
    in_a_pair(runs, folder / "runs.json")
    for strategy in STRATEGIES:
        worst = [
            largest_difference(metrics(folder / f"{strategy}-{precision}-{cp}"), metrics(folder / precision))
            for precision, cp in columns
        ]
        print(f"| `{strategy}` | " + " | ".join(f"{value:.1e}" for value in worst) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
