"""Show what is in a data set, and check it for damage: the same program as `rwkv-peft inspect`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.commands.inspect_data import main
from rwkv_peft.errors import exit_with_message

if __name__ == "__main__":
    exit_with_message(main)
