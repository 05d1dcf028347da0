"""From a RunConfig to a model ready to train: load or make the base, inject, warm-start, mark what trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwkv_peft.adapted_model import Start, make_trainable, warm_start
from rwkv_peft.base_model import fingerprint, load_base
from rwkv_peft.config.sections import RunConfig, refuse_pack
from rwkv_peft.console import say
from rwkv_peft.data.convert.json_pairs import pairs_of
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_from_scratch, model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import targeted
from rwkv_peft.peft.registry import method_of
from rwkv_peft.training.distributed.strategy import model_options
from rwkv_peft.training.optim.initial_gradients import mean_gradients


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
    """The base, where it was made here: an adapter or a tuned state is worth nothing without it."""
    tunes_state: bool = False
    """Whether only the state that texts begin with trains."""


def prepare(config: RunConfig, start: Start | None = None) -> Prepared:
    """Load or make the base, inject, warm-start, mark what trains; `start` counts before the method's `load`."""
    pairs_of(config.data)  # makes them of JSON; a bad record shows before a model is read
    path, peft = config.train.load_model, config.peft
    options = model_options(config.train)
    if path:
        base = load_base(path)
        model = model_from_state(config.model, base, path, **options)
    else:
        model = model_from_scratch(config.model, config.data.random_seed, **options)
        base = model.state_dict()
    if config.data.dataload == "pack" and model.has_time_state:
        refuse_pack(f"{path}, which holds one")
    print_of_base = fingerprint(base)
    if start is None and peft.peft_config.get("load"):
        start = warm_start(peft, print_of_base, path)
    if start is not None and not path:  # its --train_parts are copied into the very tensors
        base = {name: tensor.clone() for name, tensor in base.items()}
    gradients = _gradients(config, model) if start is None else None
    targets = make_trainable(model, peft, config.train.train_type, start=start, gradients=gradients)
    if "head" in targets and config.data.dataload == "only" and "stage_3" in config.train.strategy:
        what = "rows of other lengths go through the head in other numbers of parts, which ZeRO-3 cannot gather for"
        raise ConfigError("peft_targets", what=what, found="head with --dataload only", expected="--dataload pad")
    has_adapter, tunes_state = not method_of(peft.peft).trains_base, config.train.train_type == "state"
    return Prepared(
        model=model,
        targets=targets,
        fingerprint=print_of_base,
        has_adapter=has_adapter,
        tokenizer=start.tokenizer if start else None,
        new_base=base if (has_adapter or tunes_state) and not path else None,
        tunes_state=tunes_state,
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
    return mean_gradients(model, targeted(model, config.peft), data.first_samples(count), config.train.slice_tokens)
