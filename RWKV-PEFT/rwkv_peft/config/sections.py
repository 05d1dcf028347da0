"""Every setting of a run, as frozen dataclasses that check themselves.

The fields are also the command line: `config/flags.py` makes one flag of each, and the string below a field is its
help text. Nothing here imports torch, so that `--help` stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from rwkv_peft.errors import ConfigError

MAX_INTEGER = 2**31 - 1
"""Seeds and epoch numbers go into 64-bit counters beside other numbers."""

LOGGERS = ("csv", "tensorboard", "wandb")
"""Names that `--logger` takes."""

PUBLIC_SHAPES = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)}
"""Layers and width of the public RWKV-6 models."""


def _require(flag: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ConfigError(flag, found=value, expected=expected)


def _source(word: str) -> tuple[str, float | None]:
    """`a:0.7` as ("a", 0.7); a colon before anything but a number belongs to the path."""
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
class ModelConfig:
    """Shape of the model. 0 means: read it from the checkpoint, or follow RWKV-LM's rule."""

    n_layer: int = 0
    """Number of blocks. Read from --load_model when there is one."""
    n_embd: int = 0
    """Width of the residual stream. Read from --load_model when there is one."""
    vocab_size: int = 0
    """Rows of the embedding and of the head; 65536 for the RWKV World tokenizer."""
    head_size: int = field(default=0, metadata={"aliases": ("head_size_a",)})
    """Channels of one WKV head; 64 in every public model."""
    dim_att: int = 0
    """Width of time-mix; equal to n_embd unless said otherwise."""
    dim_ffn: int = 0
    """Inner width of channel-mix; 3.5 x n_embd, rounded down to a multiple of 32, unless said otherwise."""
    time_mix_rank: int = 0
    """Rank of the data-dependent token-shift mixes; 32, or 64 from n_embd 4096 on."""
    time_decay_rank: int = 0
    """Rank of the data-dependent decay; 64, or 128 from n_embd 4096 on."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            _require(spec.name, value, value >= 0, "a positive integer")
        if self.head_size and self.dim_att % self.head_size:
            raise ConfigError("dim_att", found=self.dim_att, expected=f"a multiple of head_size {self.head_size}")

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size

    def resolved(self) -> ModelConfig:
        """The same shape with every 0 filled in by RWKV-LM's rules; raises ConfigError where no rule exists."""
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
class PeftConfig:
    """What trains, and by which method."""

    peft: str = "none"
    """Method: bone, miss, lora, dora, pissa, olora, lora_ga, adapter, prompt, lisa, or none (everything trains)."""
    peft_config: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method as JSON, in single quotes: '{"r":64,"mode":"row"}'. Also --bone_config and so on."""
    peft_targets: tuple[str, ...] = ()
    """Layers that carry an adapter: att, ffn, head, emb, or globs over names such as att.key; att ffn unless said."""
    train_parts: tuple[str, ...] = ()
    """Base parameters that train beside the adapter: time (time_*), ln (ln*), or globs over name segments."""
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    """Storage of the trained parameters; fp32 keeps small updates that bf16 would round away."""
    quant: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How the frozen base is held: as it is, or quantised by bitsandbytes to 4 bits (nf4, fp4) or 8 (int8)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in which order."""

    data_file: tuple[str, ...] = field(default=(), metadata={"paths": True})
    """A binidx pair's prefix, or JSON (--data_type); or several, with shares of the rows: a:0.7 b:0.3."""
    val_data_file: tuple[str, ...] = field(default=(), metadata={"paths": True})
    """Validate on these pairs; unset, on PREFIX_val where a single --data_file has one beside it; none: on nothing."""
    val_fraction: float = 0.0
    """Hold this share of the documents of --data_file out of training and validate on them; a hash chooses which."""
    data_type: Literal["binidx", "jsonl", "sft"] = "binidx"
    """jsonl, sft: --data_file is files, folders or globs of JSON, text, Parquet; their tokens are cached."""
    tokenizer: str = "world"
    """With jsonl and sft: world, bytes or the path of a tokenizer.json."""
    text_key: str = ""
    """With jsonl and sft: key of the text; records are plain text then. Otherwise they are recognised."""
    fields: tuple[str, ...] = field(default=(), metadata={"aliases": ("sft_field",)})
    """With jsonl and sft: keys of question and answer, where they are not recognised: asked answer."""
    template: str = ""
    """With jsonl and sft: a Jinja2 file that makes the text of a record (see tools/json2binidx.py --help)."""
    ctx_len: int = 1024
    """Tokens of one training sample."""
    micro_bsz: int = 4
    """Samples per device and step."""
    dataload: Literal["get", "walk", "pad", "only", "pack"] = "get"
    """get: random windows; walk: RWKV-LM's, each once; pad, only: one document a row, padded or not; pack: several."""
    long: Literal["truncate", "split"] = "truncate"
    """What pad, only and pack do with a document longer than a row: cut its end off, or spread it over rows."""
    loss_mask: Literal["auto", "none", "pad", "qa", "se", "file"] = "auto"
    """Beside padding: none, pad: all trains; qa: answers; se: see --mask_id; file: PREFIX.mask.bin, if there (auto)."""
    mask_id: Mapping[str, Any] = field(default_factory=dict)
    """For se, what trains lies after mask1 and before mask0: '{"mask0":"Q:","mask1":"A:"}', texts or token ids."""
    magic_prime: int = 0
    """RWKV-LM's flag: turns get into walk. The prime is computed; another one is an error that names it."""
    my_exit_tokens: int = 0
    """RWKV-LM's flag: the tokens of the data. With get and walk, another number is an error that names it."""
    epoch_steps: int = 0
    """Batches of one epoch (a batch is nodes x devices x micro_bsz samples); 0 means one pass over the data."""
    epoch_count: int = 1
    """Number of epochs."""
    epoch_begin: int = 0
    """Number of the first epoch: where the data order and the file names go on."""
    random_seed: int = 42
    """Seed of the data order and of new weights; -1 draws one and writes it down."""

    def __post_init__(self) -> None:
        for name in ("ctx_len", "micro_bsz", "epoch_count"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "an integer of at least 1")
        for name in ("epoch_steps", "epoch_begin"):
            _require(
                name, getattr(self, name), 0 <= getattr(self, name) <= MAX_INTEGER, "an integer from 0 to 2^31 - 1"
            )
        _require("random_seed", self.random_seed, -1 <= self.random_seed <= MAX_INTEGER, "0 to 2^31 - 1, or -1")
        if isinstance(self.data_file, str):
            object.__setattr__(self, "data_file", (self.data_file,) if self.data_file else ())
        _require("val_fraction", self.val_fraction, 0 <= self.val_fraction < 1, "0 or more, and below 1")
        if self.val_fraction and self.val_data_file:
            raise ConfigError("val_fraction", what="given beside --val_data_file", expected="one of the two")
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.dataload == "only" and self.micro_bsz != 1:
            found = f"{self.micro_bsz} with --dataload only, whose rows are of different lengths"
            raise ConfigError("micro_bsz", found=found, expected=1, hint="--accumulate_grad_batches sums more of them.")
        if self.loss_mask == "se" and set(self.mask_id) != {"mask0", "mask1"}:
            found = f"{dict(self.mask_id)} with --loss_mask se"
            raise ConfigError("mask_id", found=found, expected="""'{"mask0":"Q:","mask1":"A:"}'""")
        found = " ".join(self.fields) or None
        _require("fields", found, len(self.fields) in (0, 2), "two keys, of question and answer")
        for name in ("magic_prime", "my_exit_tokens"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "an integer of at least 0")
        weights = [weight for _, weight in self.sources]
        if None in weights and set(weights) != {None}:
            found = " ".join(self.data_file)
            raise ConfigError("data_file", what="a share for some only", found=found, expected="one for each, or none")

    @property
    def walks(self) -> bool:
        """Whether rows are RWKV-LM's walk: `walk`, and `get` with a magic_prime."""
        return self.dataload == "walk" or (self.dataload == "get" and self.magic_prime > 0)

    @property
    def sources(self) -> tuple[tuple[str, float | None], ...]:
        """Prefix and share of each pair; the share None where none was given."""
        return tuple(_source(word) for word in self.data_file)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate."""

    optim: Literal["adamw", "adam_8bit"] = field(default="adamw", metadata={"spellings": {"none": "adamw"}})
    """adamw, or adam_8bit: AdamW with its state in 8 bits (needs the package bitsandbytes)."""
    lr_init: float = 2e-5
    """Learning rate after warmup."""
    lr_final: float = 2e-5
    """Learning rate at the end."""
    lr_schedule: Literal["exp", "constant", "linear", "cosine", "wsd"] = field(
        default="exp", metadata={"spellings": {"cos_decay": "cosine"}}
    )
    """Way from lr_init to lr_final: exp as in RWKV-LM, linear, cosine, wsd (linear, last 20 %), or constant (none)."""
    lr_bone: float = 0.0
    """Learning rate of the adapter after warmup, beside lr_init for --train_parts; 0: the same."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises from 1 % to lr_init."""
    beta1: float = 0.9
    """AdamW's decay of the mean."""
    beta2: float = 0.99
    """AdamW's decay of the variance."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    layerwise_lr: Literal[0, 1] = 1
    """1: as in RWKV-LM, base time_decay learns at twice the rate, and no time_* decays; 0: all alike."""
    grad_clip: float = field(default=1.0, metadata={"aliases": ("gradient_clip_val",)})
    """Largest global gradient norm; 0 turns clipping off."""
    grad_spike: float = 0.0
    """Skip steps with a gradient norm above this many times the median of the last 100; 0 turns it off."""
    max_bad_steps: int = 5
    """Stop after so many skipped steps in a row; a step without a finite loss and gradient is skipped."""
    accumulate_grad_batches: int = 1
    """Batches summed into one optimizer step."""

    def __post_init__(self) -> None:
        for name in ("lr_init", "lr_final", "lr_bone", "weight_decay", "grad_clip", "adam_eps", "grad_spike"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")
        for name in ("beta1", "beta2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        least_values = {"accumulate_grad_batches": 1, "max_bad_steps": 1, "warmup_steps": -1}  # RWKV-LM's -1: no warmup
        for name, least in least_values.items():
            _require(name, getattr(self, name), getattr(self, name) >= least, f"an integer of at least {least}")
        _require("grad_spike", self.grad_spike, self.grad_spike == 0 or self.grad_spike > 1, "a number above 1, or 0")
        if self.lr_bone and not self.lr_init:
            raise ConfigError("lr_bone", found=f"{self.lr_bone} beside --lr_init 0", expected="an lr_init above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Where the run starts, what it runs on, and what it leaves behind."""

    load_model: str = ""
    """Pretrained RWKV-6 .pth to start from. Without it, shape flags start a model from scratch."""
    proj_dir: str = "out"
    """Folder of the run: adapters, config.yaml, metrics.jsonl."""
    epoch_save: int = 1
    """Save every so many epochs; the last epoch is always saved."""
    resume: str = ""
    """Go on from a checkpoint: auto (the newest good one in --proj_dir; none: a new run), a checkpoint, or a run."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0: by --save_minutes, at the ends of epochs, and when stopped."""
    save_minutes: float = 15.0
    """Minutes between checkpoints; 0: not by time."""
    keep_last: int = 2
    """Checkpoints that stay; older ones go once a newer one is whole."""
    val_every: int = 0
    """Validate every so many optimizer steps, beside the start and the end; 0: only then."""
    patience: int = 0
    """Stop after so many validations in a row without a better held-out loss; 0: never."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    devices: str = "1"
    """Devices per node: a number, or auto for all."""
    num_nodes: int = 1
    """Number of machines."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of the model; auto is bf16 on a GPU that has it, else fp32; fp16 (GPU) scales the loss."""
    strategy: Literal[
        "auto",
        "ddp",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_3",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    ] = "auto"
    """How devices share the work: docs/training.md. Stage 3 shares out the base too; offload: the CPU runs Adam."""
    train_type: Literal["none", "infctx", "state"] = "none"
    """none: rows run whole; infctx: in slices of --chunk_ctx tokens; state: the state that texts begin with trains."""
    chunk_ctx: int = 512
    """With infctx: tokens of a slice; memory is that of one, however long --ctx_len is."""
    infctx_bptt: Literal["full", "truncated"] = "full"
    """With infctx: full is the gradient of the whole row; truncated stops it where a slice begins."""
    grad_cp: Literal[0, 1] = 0
    """1: recompute each block in the backward pass; less memory, one more forward pass."""
    wkv: Literal["auto", "native", "fla", "torch", "reference"] = "auto"
    """WKV6 operator: native (compiled), fla (optional package, GPU), torch (chunked), reference (a loop), or auto."""
    logger: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: csv, tensorboard, wandb (the last two need their packages)."""
    wandb: str = ""
    """Weights & Biases project to log to; --logger wandb alone logs to the project rwkv-peft."""
    sample_prompts: str = ""
    """File of prompts, one a line, which the model continues before and after training, for the report."""
    dry_run: bool = False
    """Print what would train, in how much memory, and stop; no weights are allocated."""
    debug: bool = False
    """Show Python tracebacks for mistakes in the input too."""

    def __post_init__(self) -> None:
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
            raise ConfigError("patience", found=f"{self.patience} without --val_every", expected="both")
        good = self.devices == "auto" or (self.devices.isdigit() and int(self.devices) >= 1)
        _require("devices", self.devices, good, "a number of at least 1, or auto")
        if self.precision == "fp16" and self.strategy.startswith("deepspeed"):
            found, expected = f"fp16 with --strategy {self.strategy}", "bf16 or fp32, or --strategy ddp"
            raise ConfigError("precision", found=found, expected=expected)

    @property
    def slice_tokens(self) -> int:
        """Tokens of a row that are in the model at a time; 0: all."""
        return self.chunk_ctx if self.train_type == "infctx" else 0


def refuse_pack(found: str) -> None:
    """Raise ConfigError: texts begin with something learned, which only the first of a packed row would get."""
    what = "pack clears the model's state where a document begins, and the tuned state would be lost"
    raise ConfigError("dataload", what=what, found=found, expected="--dataload pad, only or get")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: the sections are what each part of the program receives."""

    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.optim.lr_bone and self.peft.peft in ("none", "lisa"):
            raise ConfigError("lr_bone", found=f"--peft {self.peft.peft}", expected="a method with an adapter")
        if self.optim.optim == "adam_8bit" and self.train.strategy.startswith("deepspeed"):
            what = "DeepSpeed's flat shares cannot be saved with a state in 8 bits"
            found = f"adam_8bit with --strategy {self.train.strategy}"
            raise ConfigError("optim", what=what, found=found, expected="adamw, or --strategy ddp")
        if self.data.dataload == "pack" and self.peft.peft == "prompt":
            what = "pack clears the model's state where a document begins, and the prompt would be lost"
            raise ConfigError("dataload", what=what, found="--peft prompt", expected="--dataload pad, only or get")
        if self.train.train_type == "state":
            self._check_state_tuning()

    def _check_state_tuning(self) -> None:
        method = "" if self.peft.peft == "none" else self.peft.peft
        for name, found in (("peft", method), ("train_parts", " ".join(self.peft.train_parts))):
            if found:
                what = "has no place beside --train_type state, where the state alone trains"
                raise ConfigError(name, what=what, found=found, expected="no such flag")
        if self.data.dataload == "pack":
            refuse_pack("--train_type state")


SECTIONS: Mapping[str, type] = {
    "train": TrainConfig,
    "model": ModelConfig,
    "peft": PeftConfig,
    "data": DataConfig,
    "optim": OptimConfig,
}
