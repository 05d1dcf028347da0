"""Bad steps on purpose. Started by torchrun in test_bad_steps.py: one process of a pair that makes such runs in turn.

A plan names the calls of `training_step` that go wrong, counted from 0, and how.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rwkv_peft.config import flags as cli
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.distributed import strategy
from rwkv_peft.training.distributed.launch import leave_group
from rwkv_peft.training.run import run

NAN_LOSS, INF_LOSS, INF_GRADIENT, SPIKE = "nan_loss", "inf_loss", "inf_gradient", "spike"


class Faults:
    """Stands for `RWKV6.loss`: the same, but for the calls of the plan."""

    def __init__(self, plan: Mapping[int, str]) -> None:
        self.plan, self.calls, self.loss = plan, 0, RWKV6.loss

    def __call__(self, model: RWKV6, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        if isinstance(hidden, FakeTensor):  # of a step that is only counted, for its memory
            return self.loss(model, hidden, targets, mask)
        fault, self.calls = self.plan.get(self.calls), self.calls + 1
        if fault == INF_GRADIENT:
            hidden.register_hook(lambda grad: torch.full_like(grad, math.inf))
        loss = self.loss(model, hidden, targets, mask)
        if fault == INF_LOSS:  # without a gradient that would tell
            return loss + math.inf
        return loss * {NAN_LOSS: math.nan, SPIKE: 1e4}.get(fault, 1)


@contextlib.contextmanager
def faults(plan: Mapping[int, str]) -> Iterator[None]:
    """In which runs have bad steps."""
    replacement = Faults(plan)
    with mock.patch.object(RWKV6, "loss", lambda *args: replacement(*args)):
        yield


@contextlib.contextmanager
def half_on_cpu() -> Iterator[None]:
    """In which fp16 runs on a CPU, which users are refused."""
    with contextlib.ExitStack() as stack:
        for user in ("strategy", "banner", "resume"):
            name = f"rwkv_peft.training.{user}.activation_dtype"
            stack.enter_context(mock.patch(name, lambda train: strategy.DTYPES[train.precision]))
        yield


def main(file: str) -> None:
    strategy.WHOLE_BELOW = 100  # a tiny model has no matrix that ZeRO-3 would share out of itself
    for flags, plan in json.loads(Path(file).read_text()):
        on_this_rank = {int(call): fault for call, fault in plan.items()} if os.environ["RANK"] == "1" else {}
        with faults(on_this_rank), half_on_cpu():
            run(cli.resolve(cli.parse_args(flags)))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1])
