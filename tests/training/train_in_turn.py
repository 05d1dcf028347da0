"""Started by torchrun in test_methods_on_strategies.py: one process of a pair, which makes one run after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rwkv_peft import cli
from rwkv_peft.training import strategy
from rwkv_peft.training.run import run

if __name__ == "__main__":
    strategy.WHOLE_BELOW = 100  # a tiny model has no matrix that ZeRO-3 would share out of itself
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        run(cli.resolve(cli.parse_args(flags)))
