"""The lines that a run prints first: model, trainable parameters, memory, data, steps, device."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from rwkv_peft.base_model import BaseModel
from rwkv_peft.config.sections import DataConfig, RunConfig
from rwkv_peft.console import note, warn
from rwkv_peft.data.binidx.reader import BinidxMeta
from rwkv_peft.data.rows.sampling import DataPlan
from rwkv_peft.devices import activation_dtype, device_type, devices_per_node, world_size
from rwkv_peft.memory.estimate import CheaperSetting, Expected, cheaper_settings, expect, free_bytes
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.ops.products import widens
from rwkv_peft.ops.wkv6.op import Choice
from rwkv_peft.peft.injection import adapter_parameters


def trainable_table(model: nn.Module) -> str:
    """Return a table of the trainable parameters with a total; blocks are folded into one row.

    Columns: name pattern, shape, number of tensors, number of elements.
    """
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
    return "\n".join(["trainable parameters", *lines, total])


def millions(count: int) -> str:
    """33030144 -> 33.0M; 20480 -> 20.5K."""
    return f"{count / 1e6:.1f}M" if count >= 100_000 else f"{count / 1e3:.1f}K"


def startup_summary(
    config: RunConfig,
    model: RWKV6,
    plan: DataPlan | None,
    meta: BinidxMeta | None,
    expected: Expected | None,
    validation: Sequence[str] = (),
) -> str:
    """Return the summary of a run.

    Args:
        config: resolved.
        model: with trainable parameters marked; may be on meta.
        plan: of the training data; None without data (--dry_run).
        meta: of the data, if it has a .meta.json.
        expected: memory estimate, if there is one.
        validation: lines about the validation set.
    """
    shape = config.model
    adapters = adapter_parameters(model)
    base = sum(p.numel() for name, p in model.named_parameters() if name not in adapters)
    lines = [
        f"model   {config.train.load_model or 'from scratch'}: {shape.n_layer} layers x {shape.n_embd}, "
        f"{shape.n_head} heads x {shape.head_size}, ffn {shape.dim_ffn}, vocabulary {shape.vocab_size}, "
        f"{millions(base)} parameters",
        trainable_table(model),
    ]
    if expected is not None:
        lines += memory_lines(expected)
    if plan is not None:
        lines += _data_lines(config, plan, meta)
    lines += validation
    return "\n".join([*lines, f"output  {config.train.proj_dir}"])


def memory_lines(expected: Expected) -> list[str]:
    """Return the expected peak on each device, and what it consists of."""
    start = "" if expected.training >= expected.loading else ", while the base is loaded or created"
    lines = [f"memory  about {gigabytes(expected.peak)} per device at the peak{start}; during training:"]
    others = {"checkpoint": expected.checkpoint, "program": expected.process}
    rest = "".join(f", {name} {gigabytes(size)}" for name, size in others.items() if size)
    lines.append(
        f"        weights {gigabytes(expected.weights)}, optimizer {gigabytes(expected.optimizer)}, "
        f"activations and gradients {gigabytes(expected.step)}{rest}"
    )
    return lines


def gigabytes(count: int) -> str:
    """1234567890 -> 1.23 GB; 12345678 -> 12.3 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def announce_memory(config: RunConfig, base: BaseModel | None) -> Expected | None:
    """Estimate the memory of a run, and warn with suggestions if it is more than is free.

    If the estimate fails, the reason is printed and the result is None: the run itself may still work.
    """
    try:
        expected = expect(config, base)
        device = device_type(config.train)
        free, sharing = free_bytes(device), devices_per_node(config.train) if device == "cpu" else 1
        if free is not None and sharing * expected.peak > free:
            warn(memory_warning(expected, free, sharing, cheaper_settings(config, base, expected)))
    except RuntimeError as error:  # an operator that fake tensors do not support
        note(f"memory could not be estimated: {str(error).strip().splitlines()[0]}")
        return None
    return expected


def memory_warning(expected: Expected, free: int, sharing: int, settings: Sequence[CheaperSetting]) -> str:
    """Return one line; `sharing` processes share the free memory."""
    each = f"{sharing} times " if sharing > 1 else ""
    flags = ", ".join(f"{setting.flags} ({gigabytes(setting.peak)})" for setting in settings)
    hint = f" Settings that need less, with their peak: {flags}." if flags else ""
    return f"about {each}{gigabytes(expected.peak)} of memory needed, {gigabytes(free)} free.{hint}"


def _data_lines(config: RunConfig, plan: DataPlan, meta: BinidxMeta | None) -> list[str]:
    data, accumulate = config.data, config.optim.accumulate_grad_batches
    tokenizer = meta.tokenizer["name"] if meta else "unknown (the pair has no .meta.json)"
    files = " ".join(data.data_file)
    lines = [f"data    {files}: {plan.documents:,} documents, {plan.tokens:,} tokens, tokenizer {tokenizer}"]
    lines += [f"        {line}" for line in (_rows_line(data, plan), _mask_line(plan)) if line]
    steps = -(-plan.steps_per_epoch // accumulate) * data.epoch_count
    devices = world_size(config.train)
    at_most = "at most " if data.dataload == "only" else ""
    rows = data.micro_bsz * devices * accumulate
    size = f"{rows:,} rows x {at_most}{data.ctx_len:,} tokens = {at_most}{rows * data.ctx_len:,} tokens"
    epochs = "1 epoch" if data.epoch_count == 1 else f"{data.epoch_count:,} epochs"
    lines.append(
        f"steps   {steps:,} optimizer steps in {epochs}, {plan.passes:.2f} passes over the data\n"
        f"        each step: {size} (micro-batch {data.micro_bsz}, devices {devices}, accumulation {accumulate})"
    )
    if plan.wraps:
        passes = plan.passes / data.epoch_count
        lines.append(f"note: an epoch of {plan.steps_per_epoch:,} batches is {passes:.2f} passes over the data")
    return lines


def _rows_line(data: DataConfig, plan: DataPlan) -> str:
    """Return how documents are put into rows."""
    cut = f", {plan.truncated:,} documents truncated" if plan.truncated or data.dataload == "pad" else ""
    if data.walks:
        windows, seen = plan.samples_per_pass, plan.targets / max(plan.tokens - 1, 1)
        return f"walk: a pass is {windows:,} windows of {data.ctx_len} tokens, {seen:.2%} of the data"
    if data.dataload == "pad":
        return f"padded: {plan.padding:.0%} of each row is padding{cut}"
    if data.dataload == "pack":
        return f"packed: {plan.samples_per_pass:,} rows, {1 - plan.padding:.1%} of their tokens used{cut}"
    if data.dataload == "only":
        return f"one document per row without padding, at most {data.ctx_len} tokens{cut}"
    return ""


def _mask_line(plan: DataPlan) -> str:
    """Return how many documents have tokens in the loss, if a mask excludes some."""
    if set(plan.masks) <= {"none", "pad"}:
        return ""
    names = " ".join(dict.fromkeys(plan.masks))
    if not plan.untrained_documents:
        return f"loss mask {names}: all {plan.documents:,} documents have tokens in the loss"
    return f"loss mask {names}: {plan.untrained_documents:,} of {plan.documents:,} documents have no tokens in the loss"


def device_line(config: RunConfig, wkv: Choice) -> str:
    """Return device, dtype, WKV6 backend and strategy."""
    train = config.train
    device = device_type(train)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(activation_dtype(train)).removeprefix("torch.")
    if widens(activation_dtype(train), device):
        dtype += ", matrix products in fp32 (faster on this CPU)"
    return f"device  {name}; {dtype}; WKV6 {wkv.backend} ({wkv.why}); strategy {train.strategy}"
