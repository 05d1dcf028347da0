"""A base model with an adapter, as it is trained, used for generation, and merged.

The order matters: build the model, load the base strictly, inject and initialize from the full weights (or load the
adapter), mark the trainable parameters, quantize.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.base_model import fingerprint, load_base, shape_of, time_states
from rwkv_peft.config.method import MethodConfig
from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.model.init import add_time_state, model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.adapter_file import (
    AdapterInfo,
    check_same_base,
    load_trained,
    read_adapter,
    read_pth_adapter,
)
from rwkv_peft.peft.injection import (
    STORED,
    adapter_parameters,
    derive_bases,
    inject,
    mark_trainable,
    train_only,
)
from rwkv_peft.peft.quantization import quantize_base
from rwkv_peft.peft.registry import is_available, method_config


@dataclass(frozen=True)
class Start:
    """Trained values to start from: an adapter, or a checkpoint's."""

    path: str
    tensors: Mapping[str, Tensor]
    tokenizer: Mapping[str, Any] | None
    """Identity of the data's tokenizer, if known."""


def make_trainable(
    model: RWKV6,
    peft: PeftConfig,
    train_type: str,
    *,
    start: Start | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Add and mark the trainable parameters of `--train_type` and `--peft`, in place.

    Returns:
        The names of the layers with an adapter.
    """
    if train_type == "state":
        tune_state(model, peft, start)
        return []
    return add_adapter(model, peft, start=start, gradients=gradients)


def add_adapter(
    model: RWKV6, peft: PeftConfig, *, start: Start | None = None, gradients: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Inject the method into the model, mark the trainable parameters, and quantize the base, in place.

    Args:
        model: with its base loaded; on meta, nothing is initialized.
        peft: method, targets, trainable parts of the base, dtype and quantization.
        start: trained values to load instead of initializing.
        gradients: see `peft.inject`.
    Returns:
        The names of the layers with an adapter.
    """
    dtype = STORED[peft.adapter_dtype]
    targets = inject(
        model, peft.method, peft.peft_targets, adapter_dtype=dtype, gradients=gradients, initialize=start is None
    )
    mark_trainable(model, peft.method, peft.train_parts, dtype)
    if start is not None:
        load_trained(model, start.tensors, start.path)
        derive_bases(model)
    quantize_base(model, peft.quant)
    return targets


def tune_state(model: RWKV6, peft: PeftConfig, start: Start | None = None) -> None:
    """Make the initial state trainable and freeze the rest, in place. It starts from the base's state, or from zeros.

    Args:
        model: with its base loaded.
        peft: the state's dtype and the base's quantization.
        start: trained state to load.
    """
    add_time_state(model)
    train_only(model, time_states(dict(model.named_parameters())).keys(), STORED[peft.adapter_dtype])
    if start is not None:
        load_trained(model, start.tensors, start.path)
    quantize_base(model, peft.quant)


def warm_start(method: MethodConfig, base_fingerprint: Mapping[str, Any], base: str) -> Start:
    """Read the adapter that the method's option `load` names; a `.pth` of RWKV-PEFT does not state its method.

    Raises:
        CheckpointError: the adapter's method, its options or its base differ from the run's.
    """
    path = method.load
    if path.endswith(".pth"):
        if getattr(method, "mode", "row") != "row":
            raise CheckpointError(path, "RWKV-PEFT's .pth adapters are Bone row", found=method.mode)
        return Start(path, read_pth_adapter(path), None)
    tensors, info = read_adapter(path)
    check_same_base(info, base_fingerprint, path, base)
    if info.method != method.name:
        raise _differs(path, "method", info.method, method.name)
    theirs = _described_method(info, path)
    for name in method.meaning:
        if getattr(method, name) != getattr(theirs, name):
            raise _differs(path, name, getattr(theirs, name), getattr(method, name))
    return Start(path, tensors, info.tokenizer)


def _differs(path: str, name: str, adapters: Any, runs: Any) -> CheckpointError:
    what = f"the adapter was trained with {name}={adapters}, but this run uses {name}={runs}"
    return CheckpointError(path, what, hint="Use the same value.")


def _described_method(info: AdapterInfo, path: str | Path) -> MethodConfig:
    """Return the method and options that an adapter file states. Never imports a module because a file names it."""
    if not is_available(info.method):
        what = f"was trained with the method {info.method}, which is not part of this program"
        hint = f"If {info.method} is a Python module that you trust, pass --peft {info.method}."
        raise CheckpointError(str(path), what, hint=hint)
    try:
        return method_config(info.method, info.options)
    except ConfigError as error:
        raise CheckpointError(str(path), f"damaged metadata ({error})") from error


@dataclass(frozen=True)
class Loaded:
    """A base model with an adapter, and the files' contents."""

    model: RWKV6
    base: dict[str, Tensor]
    """The base file's tensors, in file order."""
    trained: dict[str, Tensor]
    """The adapter file's tensors."""
    info: AdapterInfo


def load_with_adapter(
    base_model: str | Path,
    adapter: str | Path,
    *,
    dtype: torch.dtype | None = None,
    as_trained: bool = False,
    method: MethodConfig | None = None,
) -> Loaded:
    """Load a base model with an adapter. The adapter file states its method, its options and its targets.

    Args:
        base_model: the `.pth` that the adapter was trained on.
        adapter: the `.safetensors` of a run, or a `.pth` of RWKV-PEFT.
        dtype: dtype of the activations and the large matrices; None keeps the base's.
        as_trained: hold the base as in training: in the same dtype, and quantized if it was.
        method: method and options of a `.pth` adapter, which does not state them.
    Raises:
        CheckpointError: a damaged file, another base, or a method from a module that has not been imported.
    """
    base = load_base(base_model)
    if method is None:
        trained, info = read_adapter(adapter)
        check_same_base(info, fingerprint(base), adapter, base_model)
        method = _described_method(info, adapter)
    else:
        trained = read_pth_adapter(adapter)
        info = _describe(trained, method, base)
    dtype = getattr(torch, info.dtype) if as_trained else dtype or base["emb.weight"].dtype
    model = model_from_state(shape_of(base, base_model), base, base_model, dtype=dtype)
    try:
        inject(model, method, info.targets, initialize=False)
    except ConfigError as error:  # the file is wrong, not the user's flags
        raise CheckpointError(str(adapter), f"damaged metadata ({error})") from error
    base_parts = {name for name in trained if name in base}
    train_only(model, adapter_parameters(model) | base_parts, torch.float32)
    load_trained(model, trained, adapter)
    derive_bases(model)
    if as_trained:
        quantize_base(model, info.quant)
    return Loaded(model.eval(), base, trained, info)


def _describe(tensors: Mapping[str, Tensor], method: MethodConfig, base: Mapping[str, Tensor]) -> AdapterInfo:
    """Return the description of a `.pth` adapter that was trained with this method."""
    layers = {name.rpartition(".")[0] for name in tensors if name not in base and "." in name}
    return AdapterInfo(
        method=method.name, options=asdict(method), targets=sorted(layers), fingerprint=fingerprint(base)
    )


def load_plain(model: str | Path, *, dtype: torch.dtype | None = None) -> RWKV6:
    """Load a model without an adapter: a base, or the result of a merge."""
    state = load_base(model)
    return model_from_state(shape_of(state, model), state, model, dtype=dtype or state["emb.weight"].dtype).eval()
