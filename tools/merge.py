"""Merge an adapter into its base model: the same program as `rwkv-peft merge`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.commands.merge import main
from rwkv_peft.errors import exit_with_message

if __name__ == "__main__":
    exit_with_message(main)
