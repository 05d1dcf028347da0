"""Fine-tune RWKV-6: python train.py --peft bone --bone_config '{"r":64}'"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-PEFT"))

from rwkv_peft.config import flags as cli
from rwkv_peft.errors import exit_with_message


def main(argv: Sequence[str]) -> None:
    settings = cli.parse_args(argv)
    if cli.is_bare(settings):
        cli.check(settings)
        from demo.example import with_demo_defaults

        settings = with_demo_defaults(settings)
    config = cli.resolve(settings)
    from rwkv_peft.training.distributed.launch import leave_group
    from rwkv_peft.training.run import run

    run(config)
    leave_group()


if __name__ == "__main__":
    exit_with_message(main)
