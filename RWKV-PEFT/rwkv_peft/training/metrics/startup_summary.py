"""The lines a run starts with: what trains, on what, for how long."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from rwkv_peft.config.sections import DataConfig, RunConfig
from rwkv_peft.console import say
from rwkv_peft.data.binidx.reader import BinidxMeta
from rwkv_peft.data.rows.sampling import DataPlan
from rwkv_peft.memory.estimate import Expected, WayOut, expect, free_bytes, ways_out
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.ops.products import widens
from rwkv_peft.ops.wkv6.op import Choice
from rwkv_peft.peft.injection import adapter_parameters
from rwkv_peft.training.distributed.strategy import activation_dtype, device_type, devices_per_node, world_size


def trained_table(model: nn.Module) -> str:
    """What trains, layers folded: name pattern, shape, how many, parameters; and the total."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[re.sub(r"\.\d+\.", ".*.", name), tuple(parameter.shape)].append(parameter.numel())
    rows = [(name, str(shape), f"x{len(n)}", f"{sum(n):,}") for (name, shape), n in groups.items()]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = [
        f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, count, size in rows
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    total = f"trainable {trained:,} of {everything:,} parameters ({millions(trained)}, {trained / everything:.2%})"
    return "\n".join(["what trains", *lines, total])


def millions(count: int) -> str:
    """33030144 -> 33.0M."""
    return f"{count / 1e6:.1f}M"


def banner(
    config: RunConfig,
    model: RWKV6,
    plan: DataPlan | None,
    meta: BinidxMeta | None,
    expected: Expected | None,
    validation: Sequence[str] = (),
) -> str:
    """Model, what trains, memory, data, lines about validation, steps, where it goes; `plan` is None without data."""
    shape = config.model
    adapters = adapter_parameters(model)
    base = sum(p.numel() for name, p in model.named_parameters() if name not in adapters)
    lines = [
        f"model   {config.train.load_model or 'from scratch'}: {shape.n_layer} layers x {shape.n_embd}, "
        f"{shape.n_head} heads x {shape.head_size}, ffn {shape.dim_ffn}, vocabulary {shape.vocab_size}, "
        f"{millions(base)} parameters",
        trained_table(model),
    ]
    if expected is not None:
        lines += memory_lines(expected)
    if plan is not None:
        lines += _data_lines(config, plan, meta)
    lines += validation
    return "\n".join([*lines, f"output  {config.train.proj_dir}"])


def memory_lines(expected: Expected) -> list[str]:
    """The expected peak on each device, and what it is made of."""
    start = "" if expected.training >= expected.loading else ", while the base is read or made"
    lines = [f"memory  about {gigabytes(expected.peak)} on each device at the peak{start}; in training:"]
    others = {"checkpoint": expected.checkpoint, "program": expected.process}
    rest = "".join(f", {name} {gigabytes(size)}" for name, size in others.items() if size)
    lines.append(
        f"        weights {gigabytes(expected.weights)}, optimizer {gigabytes(expected.optimizer)}, "
        f"activations and gradients {gigabytes(expected.step)}{rest}"
    )
    return lines


def gigabytes(count: int) -> str:
    """1234567890 -> 1.23 GB."""
    return f"{count / 1e9:.2f} GB"


def announce_memory(config: RunConfig) -> Expected | None:
    """The memory that the run will need; says so where that is more than is free, with the best ways out.

    An estimate that fails must not stop a run that might not: it says why, and returns None.
    """
    try:
        expected = expect(config)
        device = device_type(config.train)
        free, sharing = free_bytes(device), devices_per_node(config.train) if device == "cpu" else 1
        if free is not None and sharing * expected.peak > free:
            say(memory_warning(expected, free, sharing, ways_out(config, expected)))
    except RuntimeError as error:  # what fake tensors raise where an operator has no form for them
        say(f"note    memory could not be estimated: {str(error).strip().splitlines()[0]}")
        return None
    return expected


def memory_warning(expected: Expected, free: int, sharing: int, ways: Sequence[WayOut]) -> str:
    """One line; `sharing` processes share the free memory."""
    each = f"{sharing} times " if sharing > 1 else ""
    outs = ", ".join(f"{way.flags} ({gigabytes(way.peak)})" for way in ways)
    hint = f" Ways out, with their peak: {outs}." if outs else ""
    return f"warning: about {each}{gigabytes(expected.peak)} of memory needed, {gigabytes(free)} free.{hint}"


def _data_lines(config: RunConfig, plan: DataPlan, meta: BinidxMeta | None) -> list[str]:
    data, accumulate = config.data, config.optim.accumulate_grad_batches
    tokenizer = meta.tokenizer["name"] if meta else "unknown (no .meta.json beside the pair)"
    files = " ".join(data.data_file)
    lines = [f"data    {files}: {plan.documents:,} documents, {plan.tokens:,} tokens, tokenizer {tokenizer}"]
    lines += [f"        {line}" for line in (_rows_line(data, plan), _mask_line(plan)) if line]
    steps = -(-plan.steps_per_epoch // accumulate) * data.epoch_count
    devices = world_size(config.train)
    most = "at most " if data.dataload == "only" else ""
    tokens = data.micro_bsz * data.ctx_len * devices * accumulate
    lines.append(
        f"steps   {steps:,} of {most}{tokens:,} tokens ({data.epoch_count} x {plan.steps_per_epoch:,} batches, "
        f"{accumulate} a step, {devices} x {data.micro_bsz} x {data.ctx_len} tokens each): "
        f"{plan.passes:.2f} passes over the data"
    )
    if plan.wraps:
        passes = plan.passes / data.epoch_count
        lines.append(f"note    an epoch of {plan.steps_per_epoch:,} batches goes over the data {passes:.2f} times")
    return lines


def _rows_line(data: DataConfig, plan: DataPlan) -> str:
    """How documents lie in rows."""
    cut = f", {plan.truncated:,} documents cut" if plan.truncated or data.dataload == "pad" else ""
    if data.walks:
        windows, seen = plan.samples_per_pass, plan.targets / max(plan.tokens - 1, 1)
        return f"walk: a pass is {windows:,} windows of {data.ctx_len} tokens, {seen:.2%} of the data"
    if data.dataload == "pad":
        return f"padded: {plan.padding:.0%} of each row is padding{cut}"
    if data.dataload == "pack":
        return f"packed: {plan.samples_per_pass:,} rows, {1 - plan.padding:.1%} of each in use{cut}"
    if data.dataload == "only":
        return f"one document a row, of at most {data.ctx_len} tokens, unpadded{cut}"
    return ""


def _mask_line(plan: DataPlan) -> str:
    """What trains, where that is not everything."""
    if set(plan.masks) <= {"none", "pad"}:
        return ""
    names = " ".join(dict.fromkeys(plan.masks))
    return f"loss mask {names}: {plan.silent:,} of {plan.documents:,} documents hold nothing that trains"


def device_line(config: RunConfig, wkv: Choice) -> str:
    """What the run computes on."""
    train = config.train
    device = device_type(train)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(activation_dtype(train)).removeprefix("torch.")
    if widens(activation_dtype(train), device):
        dtype += ", products in fp32, which this CPU does faster"
    return f"device  {name}; {dtype}; WKV6 {wkv.backend} ({wkv.why}); strategy {train.strategy}"
