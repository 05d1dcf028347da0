"""An estimate of the memory a run will need, from its flags and the base's shapes.

`step_tensors.py` counts the tensors of a step. This file adds optimizer state, what a strategy copies or shards, and
the base file while it is loaded. A device is a GPU, or one process on a CPU; on a CPU the estimate is the resident
memory in addition to that of the imported program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv_peft.adapted_model import make_trainable
from rwkv_peft.base_model import BaseModel
from rwkv_peft.config.sections import RunConfig, TrainConfig
from rwkv_peft.devices import UNSHARDED_BELOW, device_type, model_options, world_size
from rwkv_peft.memory.allocator import LARGEST_ON_THE_HEAP, SMALLEST_MAPPED
from rwkv_peft.memory.step_tensors import Step, count_step
from rwkv_peft.model.init import add_time_state, large_matrices, model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import peft_layers
from rwkv_peft.peft.residual import ResidualLoraLinear

MOMENTS = 2
"""Moments per trainable parameter in AdamW. Each moment has the size and dtype of the parameter."""

PROCESS = {"cpu": 2**26, "cuda": 0}
"""Growth of a training process in addition to its tensors, in bytes."""

BUCKET_ELEMENTS = 200_000_000
"""Elements (fp32) of each of the two buffers in which DeepSpeed reduces gradients, as Lightning configures it."""

LIVE_ELEMENTS = 1_000_000_000
"""Elements of sharded parameters that ZeRO-3 keeps gathered at a time, as Lightning configures it."""

ORTHOGONAL_COPIES = 3
"""Temporary copies of a weight while it is initialized as an orthogonal matrix."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Bytes on one device."""

    weights: int
    """The model during training: frozen and trainable parameters."""
    optimizer: int
    """Moments, and the strategy's own copies of weights and gradients."""
    step: int
    """Peak of everything else in a step: activations kept for backward, gradients, temporaries."""
    loading: int
    """Peak before training, while the base is loaded or created."""
    checkpoint: int
    """On a CPU: copies of trainable parameters and moments, which are written while training continues."""
    process: int
    """Growth of the program itself."""

    @property
    def training(self) -> int:
        return self.weights + self.optimizer + self.step + self.checkpoint + self.process

    @property
    def peak(self) -> int:
        return max(self.training, self.loading + self.process)


def expect(config: RunConfig, base: BaseModel | None = None) -> Expected:
    """Estimate the memory of a run on one device, without allocating it.

    Args:
        config: resolved.
        base: the open base file; None to train from scratch.
    Raises:
        ConfigError, CheckpointError: as the run itself would.
    """
    train, device = config.train, device_type(config.train)
    model = model_in_training(config, base)
    trained = _trained_bytes(model)
    stage = train.zero_stage
    counted = count_step(lambda: model_in_training(config, base), _step(config, model, device, stage))
    weights, loading = counted.weights, 0
    if device == "cpu":
        kept_file, loading = _loading(config, base, model)
        weights += kept_file
    world = world_size(train)
    moments = trained // 2 if config.optim.optim == "adam_8bit" else MOMENTS * trained
    optimizer, step = moments, counted.step
    if stage:
        weights -= _sharded(model, world) if stage == 3 else 0
        offloads = train.offloads and device == "cuda"
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


def planned_model(config: RunConfig, base: BaseModel | None = None) -> RWKV6:
    """Return the run's model on the meta device (shapes without memory), with trainable parameters marked.

    The dtypes are those before quantization.
    """
    options = model_options(config.train)
    if options["wkv_backend"] == "fla":  # its kernels need real tensors; another backend keeps about as much memory
        options["wkv_backend"] = "auto"
    model = model_on_meta(config.model, **options)
    if base is not None:
        if base.has_time_state:
            add_time_state(model)
        large = large_matrices(model)
        for name, parameter in model.named_parameters():
            if name in large:
                parameter.data = parameter.data.to(model.dtype)
    make_trainable(model, config.peft, config.train.train_type)
    return model


def model_in_training(config: RunConfig, base: BaseModel | None = None) -> RWKV6:
    """Return the planned model as in the first step, with inactive blocks frozen (LISA)."""
    model = planned_model(config, base)
    active = config.peft.method.active_blocks(0, config.model.n_layer, config.data.random_seed)
    for index, block in enumerate(model.blocks):
        if active is not None and index not in active:
            block.requires_grad_(False)
    return model


def _step(config: RunConfig, model: RWKV6, device: str, stage: int) -> Step:
    data = config.data
    return Step(
        batch=data.micro_bsz,
        tokens=min(config.train.slice_tokens or data.ctx_len, data.ctx_len),
        packed=data.dataload == "pack" and not model.has_time_state,  # the run itself refuses both together
        device=device,
        quant=config.peft.quant,
        accumulates=config.optim.accumulate_grad_batches > 1,
        keeps_gradients=not stage,
        mapped_from=SMALLEST_MAPPED if saves_memory(config.train) else LARGEST_ON_THE_HEAP,
    )


def saves_memory(train: TrainConfig) -> bool:
    """Whether the run recomputes activations to save memory."""
    return bool(train.grad_cp or train.slice_tokens)


def _trained_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _updating(model: nn.Module, trained: int, device: str) -> int:
    """Return the bytes of gradients and temporaries during AdamW's update.

    On a GPU, the temporaries of all parameters exist at the same time; on a CPU, those of one parameter.
    """
    largest = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
    return trained + (trained if device == "cuda" else 2 * largest)


# --------------------------------------------------------------------------------------------- DeepSpeed


def _zero_bytes(trained: int, moments: int, world: int, stage: int, device: str) -> int:
    """Return the bytes that ZeRO keeps on a device in addition to the model.

    These are the process's shard of weights, moments, and gradients in flat buffers, the buckets in which gradients are
    reduced, and in stage 1 all gradients. With offload, `moments` is 0, because the shard of weights and moments is in
    the CPU's memory.
    """
    share, own = -(-trained // world), -(-(trained + moments if moments else 0) // world)
    buckets = 2 * BUCKET_ELEMENTS * 4
    if device == "cpu":  # a CPU's memory is used only after something is written to it
        buckets = min(buckets, trained)
    gradients = trained if stage == 1 else 0
    return own + 2 * share + gradients + buckets


def _sharded(model: nn.Module, world: int) -> int:
    """Return the bytes that ZeRO-3 saves: other processes' shards of large parameters, minus the gathered ones."""
    large = [p for p in model.parameters() if p.numel() > UNSHARDED_BELOW]
    everything, elements = sum(p.nbytes for p in large), sum(p.numel() for p in large)
    whole = everything * min(1, LIVE_ELEMENTS / max(1, elements))
    return int(everything * (1 - 1 / world) - whole)


# ------------------------------------------------------------------------------------------------- start


def _loading(config: RunConfig, base: BaseModel | None, model: nn.Module) -> tuple[int, int]:
    """Return, for a CPU, the bytes of the base that stay in memory next to the model, and the peak before training.

    The file is mapped as a whole: it stays as long as one matrix of it is in use.
    """
    if base is None:
        return _creating(config, model)
    file = base.tensors
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
    """Return the matrices that the model replaces by quantized ones or residuals."""
    layers = peft_layers(model)
    if config.peft.quant == "none":
        return {f"{name}.weight" for name, layer in layers.items() if isinstance(layer, ResidualLoraLinear)}
    plain = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"}
    return {f"{name}.weight" for name in plain | {name for name, layer in layers.items() if not layer.is_embedding}}


def _start_bytes(config: RunConfig, model: nn.Module) -> int:
    """Return the bytes that are created before training, in addition to the base's weights.

    These are quantized matrices, residuals, initial gradients, and adapters.
    """
    replaced = _replaced(config, model)
    parameters = dict(model.named_parameters())
    layers = peft_layers(model).values()
    gradients = sum(layer.weight.numel() * 4 for layer in layers if layer.config.gradient_samples)
    new = {"none": 1.0, "int8": 1 + 4 / 64}.get(config.peft.quant, 0.5 + 4 / 64)
    weights = sum(parameters[name].nbytes if new == 1 else parameters[name].numel() * new for name in replaced)
    adapters = sum(
        parameters[f"{n}.{a}"].nbytes for n, layer in peft_layers(model).items() for a in layer.adapter_names
    )
    return int(gradients + weights + adapters)


def _creating(config: RunConfig, model: nn.Module) -> tuple[int, int]:
    """Return the two values of `_loading` for a base that the run creates itself, in fp32.

    A run with an adapter keeps this base in memory in order to save it.
    """
    shape = config.model
    plain = model_on_meta(shape)
    whole = sum(p.nbytes for p in plain.parameters())
    largest = max(shape.vocab_size, shape.dim_ffn) * shape.n_embd * 4
    kept = 0
    if config.train.train_type == "state" or not config.peft.method.trains_base:
        parameters = dict(model.named_parameters())
        kept = sum(parameters[name].nbytes for name in _replaced(config, model))
    return kept, max(whole + ORTHOGONAL_COPIES * largest, whole + _start_bytes(config, model))


# ---------------------------------------------------------------------------------------------- free memory


def free_bytes(device: str) -> int | None:
    """Return the memory that is free on this kind of device; None if unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_group_limits()])


def _group_limits() -> Iterator[int]:
    """Yield what a container leaves to this process (cgroup v2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return
    if limit != "max":
        yield int(limit) - int(used)


@dataclass(frozen=True)
class CheaperSetting:
    """Flags with which the run needs less memory."""

    flags: str
    peak: int
    """Bytes on one device with these flags."""


def cheaper_settings(
    config: RunConfig, base: BaseModel | None, expected: Expected, most: int = 3
) -> list[CheaperSetting]:
    """Return settings that lower the peak by more than 5 %, lowest peak first.

    Each setting changes one thing, sometimes with two flags. Its peak is estimated like that of the run itself.

    Args:
        config: resolved.
        base: the open base file; None to train from scratch.
        expected: the estimate for `config`.
        most: maximum number of settings.
    """
    found = []
    for flags, changed in _changes(config):
        peak = expect(changed, base).peak
        if peak < 0.95 * expected.peak:
            found.append(CheaperSetting(flags, peak))
    return sorted(found, key=lambda setting: setting.peak)[:most]


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    def changed(section: str, **values: Any) -> RunConfig:
        return replace(config, **{section: replace(getattr(config, section), **values)})

    data, train, peft = config.data, config.train, config.peft
    if not train.grad_cp:
        yield "--grad_cp 1", changed("train", grad_cp=1)
    if peft.quant == "none" and (train.train_type == "state" or not peft.method.trains_base):
        yield "--quant nf4", changed("peft", quant="nf4")
    if data.micro_bsz > 1:
        yield "--micro_bsz 1", changed("data", micro_bsz=1)
    elif data.ctx_len > 1024 and train.train_type == "none":
        yield "--train_type infctx --chunk_ctx 512", changed("train", train_type="infctx", chunk_ctx=512)
    elif data.ctx_len > 256 and not train.slice_tokens:
        yield f"--ctx_len {data.ctx_len // 2}", changed("data", ctx_len=data.ctx_len // 2)
    if train.precision == "fp32" or (train.precision == "auto" and device_type(train) == "cpu"):
        yield "--precision bf16", changed("train", precision="bf16")
