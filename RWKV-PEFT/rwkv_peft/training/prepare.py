"""From a RunConfig to a model ready to train: load or make the base, inject, warm-start, mark what trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwkv_peft.assembly import add_adapter, warm_start
from rwkv_peft.checkpoint import fingerprint, load_base
from rwkv_peft.config import RunConfig
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.model.init import model_from_scratch, model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import targeted
from rwkv_peft.peft.registry import method_of
from rwkv_peft.training.banner import say
from rwkv_peft.training.gradients import mean_gradients
from rwkv_peft.training.strategy import activation_dtype


@dataclass(frozen=True)
class Prepared:
    """A model ready to train."""

    model: RWKV6
    targets: list[str]
    """Layers that carry an adapter."""
    fingerprint: Mapping[str, Any]
    """Of the base."""
    has_adapter: bool
    """Whether something beside the base trains, to be saved as an adapter."""
    tokenizer: Mapping[str, str] | None
    """Identity that the data must have: the warm-start adapter's, where it knows."""
    new_base: Mapping[str, Tensor] | None
    """The base, where it was made here: an adapter is worth nothing without it."""


def prepare(config: RunConfig) -> Prepared:
    """Load or make the base, inject, warm-start, mark what trains."""
    path, peft = config.train.load_model, config.peft
    options = model_options(config)
    if path:
        base = load_base(path)
        model = model_from_state(config.model, base, path, **options)
    else:
        model = model_from_scratch(config.model, config.data.random_seed, **options)
        base = model.state_dict()
    print_of_base = fingerprint(base)
    start = warm_start(peft, print_of_base, path) if peft.peft_config.get("load") else None
    gradients = _gradients(config, model) if start is None else None
    targets = add_adapter(model, peft, start=start, gradients=gradients)
    has_adapter = not method_of(peft.peft).trains_base
    return Prepared(
        model=model,
        targets=targets,
        fingerprint=print_of_base,
        has_adapter=has_adapter,
        tokenizer=start.tokenizer if start else None,
        new_base=base if has_adapter and not path else None,
    )


def _gradients(config: RunConfig, model: RWKV6) -> Mapping[str, Tensor] | None:
    """The targets' weights' gradients on the run's first batches, for a method that starts from them."""
    layer = method_of(config.peft.peft).layer
    if layer is None or not layer.needs_gradient:
        return None
    data = BinidxDataModule(config.data, config.model.vocab_size)
    data.setup()
    count = config.peft.peft_config["samples"]
    say(f"gradients of the base on {count} samples, for the start of {config.peft.peft}")
    return mean_gradients(model, targeted(model, config.peft), data.first_samples(count))


def model_options(config: RunConfig) -> dict[str, Any]:
    """The flags that the model itself follows."""
    return {
        "dtype": activation_dtype(config.train),
        "grad_cp": bool(config.train.grad_cp),
        "wkv_backend": config.train.wkv,
    }
