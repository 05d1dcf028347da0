"""Chat with the demo's model, or with another one by --model: the same program as `rwkv-peft chat`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "RWKV-PEFT")

from rwkv_peft.commands.chat import main
from rwkv_peft.errors import exit_with_message

OUT = ROOT / "demo" / "out"
DEFAULTS = ["--model", str(OUT / "merged.pth"), "--tokenizer", str(OUT / "tokenizer.json")]

if __name__ == "__main__":
    exit_with_message(lambda argv: main([*DEFAULTS, *argv]))
