"""Started by torchrun in test_resume_on_strategies.py: one process of a pair, which makes one run after the other.

Each line of the file has the flags of a run and the step at which SIGTERM comes to the second process, or 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from rwkv_peft.config import flags as cli
from rwkv_peft.training.distributed import strategy
from rwkv_peft.training.distributed.launch import leave_group
from rwkv_peft.training.metrics.recorder import StepRecorder
from rwkv_peft.training.run import run


def main() -> None:
    strategy.WHOLE_BELOW = 100  # a tiny model has no matrix that ZeRO-3 would share out of itself
    after_step = StepRecorder.after_step
    for flags, stop_at in json.loads(Path(sys.argv[1]).read_text()):

        def recording(self, trainer, module, stop_at=stop_at):
            after_step(self, trainer, module)
            if module.step == stop_at and trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        StepRecorder.after_step = recording
        code = 0
        try:
            run(cli.resolve(cli.parse_args(flags)))
        except SystemExit as stopped:  # in the main process
            code = stopped.code
        assert code in ((0, 143) if stop_at else (0,)), code
        torch.distributed.barrier()  # the first process may still write a checkpoint
    leave_group()


if __name__ == "__main__":
    main()
