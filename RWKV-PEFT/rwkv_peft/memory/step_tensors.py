"""Counts what a training step allocates, without allocating it.

The step runs on fake tensors: shapes, dtypes and lifetimes are real, values and memory are not. So every method,
checkpointing and the loss count exactly as they are written, including temporaries, at any size, in about a second.
Memory inside operators (scratch of kernels, packed matrices of a library) is not counted; it is small.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_peft.memory.allocator import LARGEST_ON_THE_HEAP
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.quantization import BLOCK, QuantizedWeight, quantize_base

COUNTED_BLOCKS = (2, 3)
"""Numbers of blocks that are run if all blocks are equal; the memory of more blocks is extrapolated linearly."""

HEAP_SHARE = 1.33
"""Memory of an allocation on a CPU's heap, relative to its size.

glibc cannot reuse a hole of exactly the same size for an aligned block, and longer-lived tensors fragment the heap.
Measured after three steps with allocations of 2 to 4 MB: 1.34 and 1.36 for activations of blocks (docs/training.md).
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The batch of one training step, and how gradients are kept."""

    batch: int
    tokens: int
    """Per row."""
    packed: bool = False
    """Whether rows contain several documents."""
    device: str = "cpu"
    quant: str = "none"
    accumulates: bool = False
    """Whether gradients of earlier micro-batches exist during forward and backward."""
    keeps_gradients: bool = True
    """Whether gradients stay until the update; DeepSpeed moves them to its own buffers immediately."""
    mapped_from: int = LARGEST_ON_THE_HEAP
    """Allocations of at least this many bytes are memory maps instead of heap blocks on a CPU (allocator.py)."""


@dataclass(frozen=True)
class Counted:
    """The result, in bytes."""

    weights: int
    """The model, including trainable parameters."""
    step: int
    """Peak of everything else during forward, loss and backward, including gradients."""


def count_step(build: Callable[[], RWKV6], step: Step) -> Counted:
    """Count one step of a model.

    Args:
        build: returns a new model on meta with adapters, final dtypes, and trainable parameters marked. It is called
            several times.
        step: the batch.
    """
    model = build()
    layers = len(model.blocks)
    if layers <= max(COUNTED_BLOCKS) or not _blocks_are_equal(model):
        weights, parts = _run(model, step)
        return Counted(weights, max(parts.values()))
    few, more = (_run(_with_blocks(build(), count), step) for count in COUNTED_BLOCKS)
    beyond = layers - COUNTED_BLOCKS[0]
    weights = few[0] + beyond * (more[0] - few[0])
    return Counted(weights, max(few[1][part] + beyond * (more[1][part] - few[1][part]) for part in few[1]))


class Ledger(TorchDispatchMode):
    """A dispatch mode that counts the bytes of all live storages created under it, and their peak.

    Args:
        cost: converts the size of a storage to the memory it takes.
    """

    def __init__(self, cost: Callable[[int], int] = int) -> None:
        super().__init__()
        self.cost = cost
        self.live = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():  # such as the state of a random generator, which checkpointing restores
                return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.nonzero.default:  # the number of tokens in the loss is unknown: assume all
            out = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return out

    def take_most(self) -> int:
        """Return the peak since the last call."""
        most, self.most = self.most, self.live
        return most

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = self.cost(storage.nbytes())
            self.live += self._sizes[key]
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _run(model: RWKV6, step: Step) -> tuple[int, dict[str, int]]:
    """Return the bytes of the model, and the peak of everything else in each part of a step, by name.

    Each part is linear in the number of equal blocks, because memory that grows or shrinks from block to block during
    backward is largest in the last or the first block.
    """
    ledger, parts = Ledger(), {}

    def end(part: str) -> None:
        parts[part] = max(parts.get(part, 0), ledger.take_most() - weights)

    if step.quant != "none":  # bitsandbytes builds its code tables on first use, from real tensors
        QuantizedWeight(torch.zeros(1, BLOCK), step.quant)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        _materialize(model, torch.device(step.device))
        quantize_base(model, step.quant)
        weights = ledger.live
        if step.device == "cpu":
            ledger.cost = partial(_on_the_heap, mapped_from=step.mapped_from)
        trained = [p for p in model.parameters() if p.requires_grad]
        ledger.take_most()
        if step.keeps_gradients and step.accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        if not step.keeps_gradients:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        _when_backward_reaches(model.blocks[0], lambda: end("last blocks"))
        batch = _batch(step)
        hidden, states = model.hidden(batch["input_ids"], starts=batch.get("starts"))
        end("forward")
        loss = model.loss(hidden, batch["targets"], batch["loss_mask"])
        end("loss")
        del hidden, states  # as when `forward` has returned
        ledger.take_most()
        loss.backward()
        end("first block")
    parts.setdefault("last blocks", 0)
    return weights, parts


def _on_the_heap(size: int, mapped_from: int) -> int:
    return size if size >= mapped_from else int(HEAP_SHARE * size)


def _when_backward_reaches(block: nn.Module, call: Callable[[], None]) -> None:
    def watch(_block: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda _gradient: call())

    block.register_forward_hook(watch)


def _batch(step: Step) -> Mapping[str, Tensor]:
    def rows(dtype: torch.dtype) -> Tensor:
        return torch.empty(step.batch, step.tokens, dtype=dtype, device=step.device)

    batch = {"input_ids": rows(torch.int64), "targets": rows(torch.int64), "loss_mask": rows(torch.bool)}
    return batch | ({"starts": rows(torch.bool)} if step.packed else {})


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers from meta to a device, in place. Under FakeTensorMode this takes no memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _with_blocks(model: RWKV6, count: int) -> RWKV6:
    model.blocks = model.blocks[:count]
    model.config = replace(model.config, n_layer=count)
    return model


def _blocks_are_equal(model: RWKV6) -> bool:
    """Whether all blocks have the same parameters, apart from the first block's additional norm."""
    kinds = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters() if name[:4] != "ln0.")
        for block in model.blocks
    }
    return len(kinds) == 1
