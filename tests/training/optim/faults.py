"""Injects faults into steps.

A plan maps micro-batches, counted from 0 over the run, to faults. As a program, this file is one process of a pair that
makes such runs one after the other; test_bad_steps.py starts it with torchrun.
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

from rwkv_peft.devices import DTYPES
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.training.distributed import deepspeed_strategy
from rwkv_peft.training.distributed.launch import leave_group
from tests.training.small_runs import train_flags

NAN_LOSS, INF_LOSS, INF_GRADIENT, SPIKE = "nan_loss", "inf_loss", "inf_gradient", "spike"


class Faults:
    """Replaces `RWKV6.loss`, and injects the faults of a plan."""

    def __init__(self, plan: Mapping[int, str]) -> None:
        self.plan, self.calls, self.loss = plan, 0, RWKV6.loss

    def __call__(self, model: RWKV6, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        if isinstance(hidden, FakeTensor):  # the memory estimate
            return self.loss(model, hidden, targets, mask)
        fault, self.calls = self.plan.get(self.calls), self.calls + 1
        if fault == INF_GRADIENT:
            hidden.register_hook(lambda grad: torch.full_like(grad, math.inf))
        loss = self.loss(model, hidden, targets, mask)
        if fault == INF_LOSS:  # its gradient stays finite
            return loss + math.inf
        return loss * {NAN_LOSS: math.nan, SPIKE: 1e4}.get(fault, 1)


@contextlib.contextmanager
def faults(plan: Mapping[int, str]) -> Iterator[None]:
    """A context in which runs have the faults of a plan."""
    replacement = Faults(plan)
    with mock.patch.object(RWKV6, "loss", lambda *args: replacement(*args)):
        yield


@contextlib.contextmanager
def half_on_cpu() -> Iterator[None]:
    """A context in which fp16 runs on a CPU, which users cannot do."""
    with contextlib.ExitStack() as stack:
        for user in ("devices", "training.metrics.startup_summary", "training.checkpoint.resume"):
            name = f"rwkv_peft.{user}.activation_dtype"
            stack.enter_context(mock.patch(name, lambda train: DTYPES[train.precision]))
        yield


def main(file: str) -> None:
    deepspeed_strategy.UNSHARDED_BELOW = 100  # otherwise ZeRO-3 would shard no matrix of a tiny model
    for flags, plan in json.loads(Path(file).read_text()):
        on_this_rank = {int(call): fault for call, fault in plan.items()} if os.environ["RANK"] == "1" else {}
        with faults(on_this_rank), half_on_cpu():
            train_flags(flags)
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1])
