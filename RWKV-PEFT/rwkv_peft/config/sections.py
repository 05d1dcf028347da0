"""Every setting of a run, as frozen dataclasses that check their own values.

`config/flags.py` makes one flag of each field; the string below a field is its help text. Nothing here imports torch,
so that `--help` stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from rwkv_peft.config.field_types import TypedConfig
from rwkv_peft.config.method import FullConfig, MethodConfig
from rwkv_peft.errors import ConfigError

MAX_INTEGER = 2**31 - 1
"""Limit of seeds and epoch numbers, which are packed into 64-bit counters with other numbers."""

LOGGERS = ("csv", "tensorboard", "wandb")
"""Names that `--logger` takes."""

PUBLIC_SHAPES = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)}
"""Layers and width of the public RWKV-6 models."""


def _require(flag: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(flag, found=value, expected=expected)


def _source(word: str) -> tuple[str, float | None]:
    """Return `a:0.7` as ("a", 0.7); a colon that no number follows is part of the path."""
    path, colon, share = word.rpartition(":")
    try:
        weight = float(share)
    except ValueError:
        return word, None
    if not (colon and path):
        return word, None
    _require("data_file", word, 0 < weight < math.inf, "a share above 0, as in a:0.7")
    return path, weight


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TypedConfig):
    """Shape of the model. 0 means: read it from the base model, or use RWKV-LM's rule."""

    n_layer: int = 0
    """Number of blocks. Read from --load_model if given."""
    n_embd: int = 0
    """Width of the residual stream. Read from --load_model if given."""
    vocab_size: int = 0
    """Rows of the embedding and of the head; 65536 for the RWKV World tokenizer."""
    head_size: int = field(default=0, metadata={"aliases": ("head_size_a",)})
    """Channels of one WKV head; 64 in every public model."""
    dim_att: int = 0
    """Width of time-mix; n_embd by default."""
    dim_ffn: int = 0
    """Inner width of channel-mix; by default 3.5 x n_embd, rounded down to a multiple of 32."""
    time_mix_rank: int = 0
    """Rank of the data-dependent token-shift mixes; by default 32, or 64 for n_embd of 4096 or more."""
    time_decay_rank: int = 0
    """Rank of the data-dependent decay; by default 64, or 128 for n_embd of 4096 or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for spec in fields(self):
            value = getattr(self, spec.name)
            _require(spec.name, value, value >= 0, "a positive integer")
        if self.head_size and self.dim_att % self.head_size:
            raise ConfigError("dim_att", found=self.dim_att, expected=f"a multiple of head_size {self.head_size}")

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size

    def resolved(self) -> ModelConfig:
        """Return the shape with every 0 replaced by RWKV-LM's rules.

        Raises:
            ConfigError: n_layer or n_embd is 0.
        """
        for name in ("n_layer", "n_embd"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a positive integer (or give --load_model)")
        wide = self.n_embd >= 4096
        return replace(
            self,
            vocab_size=self.vocab_size or 65536,
            head_size=self.head_size or 64,
            dim_att=self.dim_att or self.n_embd,
            dim_ffn=self.dim_ffn or int(self.n_embd * 3.5) // 32 * 32,
            time_mix_rank=self.time_mix_rank or (64 if wide else 32),
            time_decay_rank=self.time_decay_rank or (128 if wide else 64),
        )


@dataclass(frozen=True, kw_only=True)
class PeftConfig(TypedConfig):
    """Trainable parameters and the method."""

    method: MethodConfig = field(default_factory=FullConfig, metadata={"flags": ("peft", "peft_config")})
    """The method with its options. On the command line: --peft and --peft_config."""
    peft_targets: tuple[str, ...] = ()
    """Layers that get an adapter: att, ffn, head, emb, or globs over names such as att.key. Default: att ffn."""
    train_parts: tuple[str, ...] = ()
    """Base parameters to train in addition to the adapter: time (time_*), ln (ln*), or globs over name segments."""
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the trainable parameters; fp32 keeps small updates that bf16 would round away."""
    quant: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Storage of the frozen base: none, or quantized by bitsandbytes to 4 bits (nf4, fp4) or 8 bits (int8)."""

    def to_dict(self) -> dict[str, Any]:
        """Return the section in its file form: the method as its name and a mapping of its options."""
        rest = {name: value for name, value in asdict(self).items() if name != "method"}
        return {"peft": self.method.name, "peft_config": asdict(self.method), **rest}


@dataclass(frozen=True, kw_only=True)
class DataConfig(TypedConfig):
    """Training data."""

    data_file: tuple[str, ...] = field(default=(), metadata={"paths": True})
    """Prefix of a binidx pair, or a JSON file (see --data_type). To mix several: a:0.7 b:0.3 (shares of the rows)."""
    val_data_file: tuple[str, ...] = field(default=(), metadata={"paths": True})
    """Pairs to validate on; default: PREFIX_val if it exists next to a single --data_file; none: no validation."""
    val_fraction: float = 0.0
    """Share of the documents of --data_file to validate on instead of training; a hash selects them."""
    data_type: Literal["binidx", "jsonl", "sft"] = "binidx"
    """binidx: pairs; jsonl, sft: files, folders or globs of JSON, text or Parquet, converted once and cached."""
    tokenizer: str = "world"
    """With jsonl and sft: world, bytes, or the path of a tokenizer.json."""
    text_key: str = ""
    """With jsonl and sft: key of the text in records of plain text; by default the record's form is detected."""
    fields: tuple[str, ...] = field(default=(), metadata={"aliases": ("sft_field",)})
    """With jsonl and sft: keys of the question and of the answer, if they are not detected. Example: asked answer."""
    template: str = ""
    """With jsonl and sft: a Jinja2 file that turns a record into text (see rwkv-peft convert --help)."""
    ctx_len: int = 1024
    """Tokens per training sample."""
    micro_bsz: int = 4
    """Rows per device in a micro-batch."""
    dataload: Literal["get", "walk", "pad", "only", "pack"] = "get"
    """get: random windows; walk: each window once, in RWKV-LM's order; pad: one document per row, padded to --ctx_len;
    only: one document per row without padding; pack: several documents per row."""
    long: Literal["truncate", "split"] = "truncate"
    """Documents longer than a row, with pad, only and pack: truncate cuts off the end, split uses several rows."""
    loss_mask: Literal["auto", "none", "pad", "qa", "se", "file"] = "auto"
    """none, pad: compute the loss on all tokens except padding; qa: on answers only; se: as --mask_id says; file: as
    PREFIX.mask.bin says; auto: file if it exists, else none."""
    mask_id: Mapping[str, Any] = field(default_factory=dict)
    """With --loss_mask se: compute the loss on tokens after mask1 and before mask0: '{"mask0":"Q:","mask1":"A:"}'. Each
    is a text or a list of token ids."""
    magic_prime: int = 0
    """RWKV-LM's flag: turns get into walk. The program computes the prime; a different value is an error."""
    my_exit_tokens: int = 0
    """RWKV-LM's flag: number of tokens in the data. With get and walk, a different number is an error."""
    epoch_steps: int = 0
    """Micro-batches per epoch (a micro-batch is nodes x devices x micro_bsz rows); 0: one pass over the data."""
    epoch_count: int = 1
    """Number of epochs."""
    epoch_begin: int = 0
    """Number of the first epoch; data order and file names continue from it."""
    random_seed: int = 42
    """Seed of the data order and of new weights; -1 draws one and writes it to config.yaml."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ctx_len", "micro_bsz", "epoch_count"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        for name in ("epoch_steps", "epoch_begin"):
            _require(
                name, getattr(self, name), 0 <= getattr(self, name) <= MAX_INTEGER, "an integer from 0 to 2^31 - 1"
            )
        _require("random_seed", self.random_seed, -1 <= self.random_seed <= MAX_INTEGER, "0 to 2^31 - 1, or -1")
        _require("val_fraction", self.val_fraction, 0 <= self.val_fraction < 1, "0 or more, and below 1")
        if self.val_fraction and self.val_data_file:
            what = "cannot be combined with --val_data_file"
            raise ConfigError("val_fraction", what=what, hint="Use only one of them.")
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.dataload == "only" and self.micro_bsz != 1:
            what = "must be 1 with --dataload only, because its rows have different lengths"
            hint = "For larger steps, use --accumulate_grad_batches."
            raise ConfigError("micro_bsz", what=what, found=self.micro_bsz, hint=hint)
        if self.loss_mask == "se" and set(self.mask_id) != {"mask0", "mask1"}:
            found = f"{dict(self.mask_id)} with --loss_mask se"
            raise ConfigError("mask_id", found=found, expected="""'{"mask0":"Q:","mask1":"A:"}'""")
        found = " ".join(self.fields) or None
        _require("fields", found, len(self.fields) in (0, 2), "two keys, those of question and answer")
        for name in ("magic_prime", "my_exit_tokens"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "an integer of at least 0")
        weights = [weight for _, weight in self.sources]
        if None in weights and set(weights) != {None}:
            found = " ".join(self.data_file)
            raise ConfigError(
                "data_file", what="only some have a share", found=found, expected="a share for each, or none"
            )

    @property
    def walks(self) -> bool:
        """Whether rows come in RWKV-LM's order: `walk`, or `get` with a magic_prime."""
        return self.dataload == "walk" or (self.dataload == "get" and self.magic_prime > 0)

    @property
    def sources(self) -> tuple[tuple[str, float | None], ...]:
        """Prefix and share of each pair; the share is None if none was given."""
        return tuple(_source(word) for word in self.data_file)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(TypedConfig):
    """AdamW and its learning rate."""

    optim: Literal["adamw", "adam_8bit"] = field(default="adamw", metadata={"spellings": {"none": "adamw"}})
    """adamw, or adam_8bit: AdamW with 8-bit states (needs the package bitsandbytes)."""
    lr_init: float = 2e-5
    """Learning rate after warmup."""
    lr_final: float = 2e-5
    """Learning rate at the end."""
    lr_schedule: Literal["exp", "constant", "linear", "cosine", "wsd"] = field(
        default="exp", metadata={"spellings": {"cos_decay": "cosine"}}
    )
    """From lr_init to lr_final: exp (as in RWKV-LM), linear, cosine, wsd (linear in the last 20 %), or constant."""
    lr_bone: float = 0.0
    """Learning rate of the adapter (any method) after warmup; 0 uses --lr_init. --train_parts always use --lr_init."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 1 % to 100 %."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean."""
    beta2: float = 0.99
    """AdamW's decay rate of the variance."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    layerwise_lr: Literal[0, 1] = 1
    """1: as RWKV-LM: twice the learning rate for the base's time_decay, no weight decay for time_*; 0: all equal."""
    grad_clip: float = field(default=1.0, metadata={"aliases": ("gradient_clip_val",)})
    """Largest global gradient norm; 0: no clipping."""
    grad_spike: float = 0.0
    """Skip steps with a gradient norm above X times the median of the last 100 steps; 0: never."""
    max_bad_steps: int = 5
    """Stop after N skipped steps in a row. Steps with a NaN or infinite loss or gradient are skipped."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_init", "lr_final", "lr_bone", "weight_decay", "grad_clip", "adam_eps", "grad_spike"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")
        for name in ("beta1", "beta2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        least_values = {"accumulate_grad_batches": 1, "max_bad_steps": 1, "warmup_steps": -1}  # RWKV-LM's -1: no warmup
        for name, least in least_values.items():
            _require(name, getattr(self, name), getattr(self, name) >= least, f"an integer of at least {least}")
        _require("grad_spike", self.grad_spike, self.grad_spike == 0 or self.grad_spike > 1, "a number above 1, or 0")
        if self.lr_bone and not self.lr_init:
            raise ConfigError("lr_bone", what="needs a --lr_init above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TypedConfig):
    """The run: start, hardware, output."""

    load_model: str = ""
    """Pretrained RWKV-6 .pth to start from. Without it, shape flags train a new model from scratch."""
    proj_dir: str = "out"
    """Folder of the run: adapters, checkpoints, config.yaml, metrics.jsonl, report.html."""
    epoch_save: int = 1
    """Save every N epochs; the last epoch is always saved."""
    resume: str = ""
    """auto: the newest valid checkpoint in --proj_dir, or a new run if there is none; or the path of a checkpoint or
    run."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0: only by time (--save_minutes), at epoch end, and when interrupted."""
    save_minutes: float = 15.0
    """Minutes between checkpoints; 0: not by time."""
    keep_last: int = 2
    """Number of checkpoints to keep; older ones are deleted once a newer one is complete."""
    val_every: int = 0
    """Optimizer steps between validations; 0: only at the start and the end."""
    patience: int = 0
    """Stop after N validations in a row without a lower validation loss; 0: never."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto uses a GPU if available."""
    devices: str = "1"
    """Devices per node: a number, or auto for all."""
    num_nodes: int = 1
    """Number of machines."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Dtype of activations and large matrices; auto: bf16 on a GPU that supports it, else fp32; fp16 needs a GPU."""
    strategy: Literal[
        "auto",
        "ddp",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_3",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    ] = "auto"
    """How devices share the work, see docs/training.md. Stage 3 also shards the base; offload: the CPU runs Adam."""
    train_type: Literal["none", "infctx", "state"] = "none"
    """none: process whole rows; infctx: rows in slices of --chunk_ctx tokens; state: train the initial state."""
    chunk_ctx: int = 512
    """With infctx: tokens per slice. Memory depends on the slice, not on --ctx_len."""
    infctx_bptt: Literal["full", "truncated"] = "full"
    """With infctx: full computes the gradient of the whole row; truncated stops it between slices."""
    grad_cp: Literal[0, 1] = 0
    """1: recompute each block in the backward pass; less memory, one more forward pass."""
    wkv: Literal["auto", "native", "fla", "torch", "reference"] = "auto"
    """WKV6 operator: native (compiled), fla (optional package, GPU), torch (chunked), reference (a loop), or auto."""
    logger: tuple[str, ...] = ()
    """Loggers in addition to metrics.jsonl: csv, tensorboard, wandb (the last two need their packages)."""
    wandb: str = ""
    """Weights & Biases project to log to; --logger wandb alone logs to the project rwkv-peft."""
    sample_prompts: str = ""
    """File with one prompt per line; the model completes them before and after training, for the report."""
    dry_run: bool = False
    """Print trainable parameters and estimated memory, then exit; no weights are allocated."""
    debug: bool = False
    """Show Python tracebacks for user errors too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("proj_dir", repr(self.proj_dir), bool(self.proj_dir), "a folder")
        _require("epoch_save", self.epoch_save, self.epoch_save >= 1, "an integer of at least 1")
        for name in ("chunk_ctx", "num_nodes", "keep_last"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        _require("save_every", self.save_every, self.save_every >= 0, "an integer of at least 0")
        _require("save_minutes", self.save_minutes, 0 <= self.save_minutes < math.inf, "a number of at least 0")
        for name in self.logger:
            _require("logger", name, name in LOGGERS, "csv, tensorboard or wandb")
        for name in ("val_every", "patience"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "an integer of at least 0")
        if self.patience and not self.val_every:
            raise ConfigError("patience", what="needs --val_every")
        good = self.devices == "auto" or (self.devices.isdigit() and int(self.devices) >= 1)
        _require("devices", self.devices, good, "a number of at least 1, or auto")
        if self.precision == "fp16" and self.zero_stage:
            found, expected = f"fp16 with --strategy {self.strategy}", "bf16 or fp32, or --strategy ddp"
            raise ConfigError("precision", found=found, expected=expected)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the strategy, 1 to 3; 0 without DeepSpeed."""
        return int(self.strategy.removeprefix("deepspeed_stage_")[0]) if self.strategy.startswith("deepspeed") else 0

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is on the CPU and updates there."""
        return self.strategy.endswith("_offload")

    @property
    def slice_tokens(self) -> int:
        """Tokens of a row that the model processes at a time; 0: all."""
        return self.chunk_ctx if self.train_type == "infctx" else 0


def refuse_pack(found: str) -> None:
    """Raise the error for `--dataload pack` with a trained initial state or prompt."""
    what = "pack clears the model's state at each document, so the tuned state or prompt would be lost"
    raise ConfigError("dataload", what=what, found=found, expected="--dataload pad, only or get")


@dataclass(frozen=True, kw_only=True)
class RunConfig(TypedConfig):
    """All settings of a run, in sections. Each part of the program receives the section that it needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        method = self.peft.method
        if self.optim.lr_bone and method.trains_base:
            raise ConfigError("lr_bone", what=f"cannot be used with --peft {method.name}, which has no adapter")
        if self.optim.optim == "adam_8bit" and self.train.zero_stage:
            what = "DeepSpeed's sharded optimizer state cannot be saved in 8 bits"
            found = f"adam_8bit with --strategy {self.train.strategy}"
            raise ConfigError("optim", what=what, found=found, expected="adamw, or --strategy ddp")
        if self.data.dataload == "pack" and not method.allows_packing:
            refuse_pack(f"--peft {method.name}")
        if self.train.train_type == "state":
            self._check_state_tuning()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sections as config.yaml and checkpoints store them."""
        sections = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: s.to_dict() if isinstance(s, PeftConfig) else asdict(s) for name, s in sections.items()}

    def _check_state_tuning(self) -> None:
        method = "" if isinstance(self.peft.method, FullConfig) else self.peft.method.name
        for name, found in (("peft", method), ("train_parts", " ".join(self.peft.train_parts))):
            if found:
                what = "cannot be combined with --train_type state, which trains only the initial state"
                raise ConfigError(name, what=what, found=found, hint="Omit the flag.")
        if self.data.dataload == "pack":
            refuse_pack("--train_type state")


SECTIONS: Mapping[str, type] = {
    "train": TrainConfig,
    "model": ModelConfig,
    "peft": PeftConfig,
    "data": DataConfig,
    "optim": OptimConfig,
}
