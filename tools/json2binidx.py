#!/usr/bin/env python3
"""Convert text, instructions and chats to token files for training: the same program as `rwkv-peft convert`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.commands.convert import main
from rwkv_peft.errors import exit_with_message

if __name__ == "__main__":
    exit_with_message(main)
