#!/usr/bin/env python3
"""Tokenise text, instructions and chats into a binidx pair for training. See --help."""

import sys
from pathlib import Path

# In place of tools/, so that a file here can never stand in for a module of the standard library (inspect, ...).
sys.path[0] = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")

from rwkv_peft.data.convert.command_line import main
from rwkv_peft.errors import exit_with_message

if __name__ == "__main__":
    exit_with_message(main)
