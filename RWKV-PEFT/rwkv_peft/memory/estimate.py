"""The memory that a run will need, from its flags alone.

Tensors of a step are counted by `allocations.py`; this adds what lives beside the step: moments, what a strategy
copies or shares out, the base file while it is read. A device is a GPU, or one process on a CPU, where what counts is
its resident memory above that of the imported program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv_peft.adapted_model import make_trainable
from rwkv_peft.base_model import load_base, time_states
from rwkv_peft.config.sections import RunConfig, TrainConfig
from rwkv_peft.memory.allocator import LARGEST_ON_THE_HEAP, SMALLEST_OF_ITS_OWN
from rwkv_peft.memory.step_tensors import Step, count_step
from rwkv_peft.model.init import add_time_state, large_matrices, model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import peft_layers
from rwkv_peft.peft.methods.lisa import LisaConfig
from rwkv_peft.peft.registry import method_of
from rwkv_peft.peft.residual import DerivedLinear
from rwkv_peft.training.distributed.strategy import WHOLE_BELOW, device_type, model_options, world_size
from rwkv_peft.training.optim.lisa import BlockDraw

MOMENTS = 2
"""Of AdamW, each as large as what trains and in its dtype."""

PROCESS = {"cpu": 2**26, "cuda": 0}
"""What a training process grows by beside its tensors."""

BUCKET_NUMBERS = 200_000_000
"""Of each of the two buffers in which DeepSpeed, as Lightning sets it, reduces gradients; fp32."""

LIVE_NUMBERS = 1_000_000_000
"""Of shared-out parameters that ZeRO-3, as Lightning sets it, keeps whole at a time."""

ORTHOGONAL_COPIES = 3
"""Matrices beside a new weight while it is made orthogonal."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Bytes on one device."""

    weights: int
    """The model as it is held in training: what is frozen, and what trains."""
    optimizer: int
    """Moments, and what the strategy keeps of weights and gradients beside the model."""
    step: int
    """The most beside these in a step: activations kept for backward, gradients, temporaries."""
    loading: int
    """The most before training, while the base is read or made."""
    checkpoint: int
    """Copies of what trains and of its moments, on a CPU: training goes on while they are written."""
    process: int
    """The program's own growth."""

    @property
    def training(self) -> int:
        return self.weights + self.optimizer + self.step + self.checkpoint + self.process

    @property
    def peak(self) -> int:
        return max(self.training, self.loading + self.process)


def expect(config: RunConfig) -> Expected:
    """Count the memory of a run on one device, without allocating it.

    Args:
        config: resolved.
    Raises:
        ConfigError, CheckpointError: as the run itself would.
    """
    train, device = config.train, device_type(config.train)
    model = model_as_held(config)
    trained = _trained_bytes(model)
    stage = int(train.strategy.removeprefix("deepspeed_stage_")[0]) if train.strategy.startswith("deepspeed") else 0
    counted = count_step(lambda: model_as_held(config), _step(config, model, device, stage))
    weights, loading = counted.weights, 0
    if device == "cpu":
        kept_file, loading = _loading(config, model, counted.weights)
        weights += kept_file
    world = world_size(train)
    moments = trained // 2 if config.optim.optim == "adam_8bit" else MOMENTS * trained
    optimizer, step = moments, counted.step
    if stage:
        weights -= _shared_out(model, world) if stage == 3 else 0
        offloads = train.strategy.endswith("offload") and device == "cuda"
        optimizer = _zero_bytes(trained, 0 if offloads else moments, world, stage, device)
    elif train.strategy == "ddp" or world > 1:
        optimizer += trained  # the buckets
    updating = _updating(model, trained, device) if not stage else 0
    return Expected(
        weights=weights,
        optimizer=optimizer,
        step=max(step, updating),
        loading=loading,
        checkpoint=trained + moments if device == "cpu" else 0,
        process=PROCESS[device],
    )


def model_on_its_way(config: RunConfig) -> RWKV6:
    """The run's model on meta, with what trains: each parameter in the dtype that it has before it is quantised."""
    options = model_options(config.train)
    if options["wkv_backend"] == "fla":  # its kernels run on real tensors only; it keeps much the same
        options["wkv_backend"] = "auto"
    model = model_on_meta(config.model, **options)
    if config.train.load_model:
        if time_states(load_base(config.train.load_model)):
            add_time_state(model)
        large = large_matrices(model)
        for name, parameter in model.named_parameters():
            if name in large:
                parameter.data = parameter.data.to(model.dtype)
    make_trainable(model, config.peft, config.train.train_type)
    return model


def model_as_held(config: RunConfig) -> RWKV6:
    """The same, with those blocks frozen that LISA does not draw first."""
    model = model_on_its_way(config)
    if config.peft.peft == "lisa":
        draw = BlockDraw(LisaConfig(**config.peft.peft_config), config.model.n_layer, config.data.random_seed)
        for index in set(range(config.model.n_layer)) - draw.blocks(0):
            model.blocks[index].requires_grad_(False)
    return model


def _step(config: RunConfig, model: RWKV6, device: str, stage: int) -> Step:
    data = config.data
    return Step(
        batch=data.micro_bsz,
        tokens=min(config.train.slice_tokens or data.ctx_len, data.ctx_len),
        packed=data.dataload == "pack" and not model.has_time_state,  # together they are refused, later
        device=device,
        quant=config.peft.quant,
        accumulates=config.optim.accumulate_grad_batches > 1,
        keeps_gradients=not stage,
        mapped_from=SMALLEST_OF_ITS_OWN if saves_memory(config.train) else LARGEST_ON_THE_HEAP,
    )


def saves_memory(train: TrainConfig) -> bool:
    """Whether the run recomputes, to need less memory."""
    return bool(train.grad_cp or train.slice_tokens)


def _trained_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _updating(model: nn.Module, trained: int, device: str) -> int:
    """While AdamW updates: gradients, and temporaries, on a GPU of all parameters at once."""
    largest = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
    return trained + (trained if device == "cuda" else 2 * largest)


# --------------------------------------------------------------------------------------------- DeepSpeed


def _zero_bytes(trained: int, moments: int, world: int, stage: int, device: str) -> int:
    """What ZeRO keeps beside the model: its share of weights, moments and gradients in flat buffers of its own, the
    gradients as they are made (stage 1), and the buckets that they are reduced in. Without moments, which the CPU has
    then, the share of weights is the CPU's too."""
    share, own = -(-trained // world), -(-(trained + moments if moments else 0) // world)
    buckets = 2 * BUCKET_NUMBERS * 4
    if device == "cpu":  # memory that is not written to does not count there
        buckets = min(buckets, trained)
    gradients = trained if stage == 1 else 0
    return own + 2 * share + gradients + buckets


def _shared_out(model: nn.Module, world: int) -> int:
    """What ZeRO-3 saves of the weights: others' shares of what is large, but for what is whole at a time."""
    large = [p for p in model.parameters() if p.numel() > WHOLE_BELOW]
    everything, numbers = sum(p.nbytes for p in large), sum(p.numel() for p in large)
    whole = everything * min(1, LIVE_NUMBERS / max(1, numbers))
    return int(everything * (1 - 1 / world) - whole)


# ------------------------------------------------------------------------------------------------- start


def _loading(config: RunConfig, model: nn.Module, held: int) -> tuple[int, int]:
    """On a CPU: bytes of the base that stay beside the model in training, and the most before training.

    A file's mapping is one piece: as long as one matrix of it is in use, all of it stays.
    """
    path = config.train.load_model
    if not path:
        return _making(config, model, held)
    file = load_base(path)
    mapped = sum(tensor.nbytes for tensor in file.values())
    parameters = dict(model.named_parameters())
    replaced = _replaced(config, model)
    as_in_file = {
        name for name, tensor in file.items() if name in parameters and tensor.dtype == parameters[name].dtype
    }
    in_use = sum(file[name].nbytes for name in as_in_file - replaced)
    copies = sum(p.nbytes for name, p in parameters.items() if name not in as_in_file)
    return (mapped - in_use if in_use else 0), mapped + copies + _start_bytes(config, model)


def _replaced(config: RunConfig, model: nn.Module) -> set[str]:
    """The matrices in whose place the model holds others: quantised ones, or residuals."""
    layers = peft_layers(model)
    if config.peft.quant == "none":
        return {f"{name}.weight" for name, layer in layers.items() if isinstance(layer, DerivedLinear)}
    plain = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"}
    return {f"{name}.weight" for name in plain | {name for name, layer in layers.items() if not layer.looks_up}}


def _start_bytes(config: RunConfig, model: nn.Module) -> int:
    """What a method holds before training: quantised matrices beside the full ones, residuals, gradients."""
    replaced = _replaced(config, model)
    parameters = dict(model.named_parameters())
    layers = peft_layers(model).values()
    gradients = sum(layer.weight.numel() * 4 for layer in layers if layer.needs_gradient)
    new = {"none": 1.0, "int8": 1 + 4 / 64}.get(config.peft.quant, 0.5 + 4 / 64)
    numbers = sum(parameters[name].nbytes if new == 1 else parameters[name].numel() * new for name in replaced)
    adapters = sum(
        parameters[f"{n}.{a}"].nbytes for n, layer in peft_layers(model).items() for a in layer.adapter_names
    )
    return int(gradients + numbers + adapters)


def _making(config: RunConfig, model: nn.Module, held: int) -> tuple[int, int]:
    """The same for a base that is made here, in fp32; a run with an adapter keeps it, to save it."""
    shape = config.model
    plain = model_on_meta(shape)
    whole = sum(p.nbytes for p in plain.parameters())
    largest = max(shape.vocab_size, shape.dim_ffn) * shape.n_embd * 4
    kept = 0
    if config.train.train_type == "state" or not method_of(config.peft.peft).trains_base:
        parameters = dict(model.named_parameters())
        kept = sum(parameters[name].nbytes for name in _replaced(config, model))
    return kept, max(whole + ORTHOGONAL_COPIES * largest, whole + _start_bytes(config, model))


# -------------------------------------------------------------------------------------------- what there is


def free_bytes(device: str) -> int | None:
    """Memory that a new program could take on this kind of device; None where it cannot be known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_group_limits()])


def _group_limits() -> Iterator[int]:
    """What a container leaves to this process (cgroup v2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return
    if limit != "max":
        yield int(limit) - int(used)


@dataclass(frozen=True)
class WayOut:
    """Flags that need less."""

    flags: str
    peak: int
    """Bytes on one device with them."""


def ways_out(config: RunConfig, expected: Expected, most: int = 3) -> list[WayOut]:
    """The changes of one flag that lower the peak by most, each counted like the run itself; the best first."""
    found = []
    for flags, changed in _changes(config):
        peak = expect(changed).peak
        if peak < 0.95 * expected.peak:
            found.append(WayOut(flags, peak))
    return sorted(found, key=lambda way: way.peak)[:most]


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    def changed(section: str, **values: Any) -> RunConfig:
        return replace(config, **{section: replace(getattr(config, section), **values)})

    data, train, peft = config.data, config.train, config.peft
    if not train.grad_cp:
        yield "--grad_cp 1", changed("train", grad_cp=1)
    if peft.quant == "none" and (train.train_type == "state" or not method_of(peft.peft).trains_base):
        yield "--quant nf4", changed("peft", quant="nf4")
    if data.micro_bsz > 1:
        yield "--micro_bsz 1", changed("data", micro_bsz=1)
    elif data.ctx_len > 1024 and train.train_type == "none":
        yield "--train_type infctx --chunk_ctx 512", changed("train", train_type="infctx", chunk_ctx=512)
    elif data.ctx_len > 256 and not train.slice_tokens:
        yield f"--ctx_len {data.ctx_len // 2}", changed("data", ctx_len=data.ctx_len // 2)
    if train.precision == "fp32" or (train.precision == "auto" and device_type(train) == "cpu"):
        yield "--precision bf16", changed("train", precision="bf16")
