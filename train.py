"""Fine-tune RWKV-6: python train.py --peft bone --bone_config '{"r":64}'. The same program as `rwkv-peft train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-PEFT"))

from rwkv_peft.commands.train import main
from rwkv_peft.errors import exit_with_message

if __name__ == "__main__":
    exit_with_message(main)
