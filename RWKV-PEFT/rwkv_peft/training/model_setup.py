"""From a RunConfig to a model that is ready to train: shape, base weights, adapters, trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from rwkv_peft.adapted_model import Start, make_trainable, warm_start
from rwkv_peft.base_model import BaseModel, fingerprint
from rwkv_peft.config.sections import ModelConfig, RunConfig, refuse_pack
from rwkv_peft.console import say
from rwkv_peft.data.training_data import TrainingData
from rwkv_peft.devices import model_options
from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_from_scratch, model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import targeted
from rwkv_peft.training.optim.initial_gradients import mean_gradients


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train."""

    model: RWKV6
    targets: list[str]
    """Names of the layers with an adapter."""
    fingerprint: Mapping[str, Any]
    """Fingerprint of the base model."""
    has_adapter: bool
    """Whether the result of the run is an adapter file."""
    tokenizer: Mapping[str, str] | None
    """Tokenizer of the adapter that the run starts from, which the data must have been made with; None if unknown."""
    new_base: Mapping[str, Tensor] | None
    """The base if it was made here: an adapter or a tuned state is useless without it, so the run saves it."""
    tunes_state: bool = False
    """Whether the run trains only the initial state (`--train_type state`)."""


def open_base(config: RunConfig) -> BaseModel | None:
    """Open the file of `--load_model`; None to train from scratch."""
    return BaseModel.open(config.train.load_model) if config.train.load_model else None


def resolve_shape(config: RunConfig, base: BaseModel | None, data_vocab_size: int = 0) -> RunConfig:
    """Fill in the model's shape, from the base if there is one, otherwise from the flags and the data.

    Args:
        config: with shape flags, 0 where they are not given.
        base: the open base file.
        data_vocab_size: vocabulary of the data's tokenizer; 0 if unknown. Used from scratch only.
    Raises:
        ConfigError: a shape flag differs from the base.
    """
    asked = config.model
    if base is None:
        asked = replace(asked, vocab_size=asked.vocab_size or data_vocab_size)
        return replace(config, model=asked.resolved())
    for spec in fields(ModelConfig):
        wanted, found = getattr(asked, spec.name), getattr(base.shape, spec.name)
        if wanted and wanted != found:
            hint = "Omit the flag: the shape is read from the file."
            raise ConfigError(spec.name, what=f"differs from {base.path}", found=wanted, expected=found, hint=hint)
    return replace(config, model=base.shape)


def prepare(config: RunConfig, base: BaseModel | None, data: TrainingData, start: Start | None = None) -> Prepared:
    """Load or create the base, inject adapters, load their values, and mark trainable parameters.

    Args:
        config: resolved.
        base: the open base file; None creates a new model.
        data: some methods initialize from gradients on its first samples.
        start: trained values to start from, such as a checkpoint's. It takes precedence over the method's `load`.
    """
    peft, options = config.peft, model_options(config.train)
    if base is not None:
        model = model_from_state(config.model, base.tensors, base.path, **options)
    else:
        model = model_from_scratch(config.model, config.data.random_seed, **options)
    tensors = base.tensors if base is not None else model.state_dict()
    if config.data.dataload == "pack" and model.has_time_state:
        refuse_pack(f"{config.train.load_model}, which has a tuned state")
    base_fingerprint = base.fingerprint if base is not None else fingerprint(tensors)
    if start is None and peft.method.load:
        start = warm_start(peft.method, base_fingerprint, config.train.load_model)
    if start is not None and base is None:  # values of --train_parts are copied into these very tensors
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    gradients = _gradients(config, model, data) if start is None and peft.method.gradient_samples else None
    targets = make_trainable(model, peft, config.train.train_type, start=start, gradients=gradients)
    if "head" in targets and config.data.dataload == "only" and config.train.zero_stage == 3:
        what = "ZeRO-3 needs equally many calls of the head on all processes, but rows of different lengths differ"
        raise ConfigError("peft_targets", what=what, found="head with --dataload only", expected="--dataload pad")
    has_adapter, tunes_state = not peft.method.trains_base, config.train.train_type == "state"
    return Prepared(
        model=model,
        targets=targets,
        fingerprint=base_fingerprint,
        has_adapter=has_adapter,
        tokenizer=start.tokenizer if start else None,
        new_base=tensors if (has_adapter or tunes_state) and base is None else None,
        tunes_state=tunes_state,
    )


def _gradients(config: RunConfig, model: RWKV6, data: TrainingData) -> Mapping[str, Tensor]:
    """Return the gradients of the target layers' weights on the run's first samples."""
    method = config.peft.method
    count, targets = method.gradient_samples, targeted(model, method, config.peft.peft_targets)
    say(f"computing gradients of the base on {count} samples to initialize {method.name}")
    return mean_gradients(model, targets, data.first_samples(count), config.train.slice_tokens)
