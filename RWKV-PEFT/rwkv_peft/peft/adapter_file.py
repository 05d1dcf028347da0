"""The adapter file: the trained tensors, and everything needed to use them, in one `.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rwkv_peft.base_model import check_keys, load_base, same_base, save_base, write_atomically
from rwkv_peft.errors import CheckpointError
from rwkv_peft.peft.injection import initial_factors

FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter file says of itself."""

    method: str
    """Name in the registry."""
    options: Mapping[str, Any]
    """The method's config: r, mode, alpha, ..."""
    targets: list[str]
    """Qualified names of the layers that carry an adapter."""
    fingerprint: Mapping[str, Any]
    """Of the base the adapter was trained on (checkpoint.fingerprint)."""
    quant: str = "none"
    """How the base was held while it trained."""
    dtype: str = "float32"
    """Of the large matrices before that, and of the activations."""
    tokenizer: Mapping[str, Any] | None = None
    """Identity of the tokenizer of its data; None where the data did not say."""
    format_version: int = FORMAT_VERSION


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Exactly what an adapter file keeps, by name: what trains, and the initial factors that a base is derived from."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | initial_factors(model)


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter file, whole or not at all."""
    metadata = {key: json.dumps(value) for key, value in asdict(info).items()}
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], AdapterInfo]:
    """The tensors and the description of an adapter file.

    Raises:
        CheckpointError: missing, damaged, not an adapter of ours, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(str(path), "is a folder" if path.is_dir() else "no such adapter file")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"not a readable .safetensors ({error})") from error
    return tensors, _parse_info(metadata, str(path))


def _parse_info(metadata: Mapping[str, str], path: str) -> AdapterInfo:
    """The description out of a file's metadata, every part of the right kind."""
    try:
        values = {key: json.loads(value) for key, value in metadata.items()}
    except json.JSONDecodeError as error:
        raise CheckpointError(path, "its description is not JSON; not an adapter of this program") from error
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        expected = f"format {FORMAT_VERSION}"
        raise CheckpointError(path, "not an adapter of this program", found=f"format {version!r}", expected=expected)
    kinds = {
        "method": str,
        "options": dict,
        "targets": list,
        "quant": str,
        "dtype": str,
        "fingerprint": dict,
        "tokenizer": dict | None,
    }
    for key, kind in kinds.items():
        if key not in values or not isinstance(values[key], kind):
            raise CheckpointError(path, f"damaged description: {key} is {values.get(key)!r}")
    named = all(isinstance(name, str) for name in values["targets"])
    if not named or set(values["fingerprint"]) != {"shapes", "dtypes", "samples"}:
        raise CheckpointError(path, "damaged description: targets or fingerprint")
    return AdapterInfo(**{key: values[key] for key in (*kinds, "format_version")})


def check_same_base(info: AdapterInfo, fingerprint: Mapping[str, Any], adapter: str | Path, base: str | Path) -> None:
    """Raise CheckpointError unless the adapter was trained on this base."""
    if not same_base(info.fingerprint, fingerprint):
        raise CheckpointError(
            str(adapter), f"was trained on another base than {base}", hint="Give the base it was trained on."
        )


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy an adapter file's tensors into a model that carries the same adapter; names and shapes must agree.

    Raises:
        CheckpointError: a trained parameter without a tensor, a tensor without a parameter, another shape.
    """
    places = {name: p for name, p in model.named_parameters() if p.requires_grad} | initial_factors(model)
    check_keys(
        {name: place.shape for name, place in places.items()}, tensors, path, what="adapter and its --train_parts"
    )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(str(path), f"{name} has values that are not finite", hint="Take an earlier adapter.")
    for name, tensor in tensors.items():
        places[name].data.copy_(tensor)


PTH_NAMES = {"miss": "disha"}
"""Our names of parameters that RWKV-PEFT calls something else."""


def read_pth_adapter(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter in RWKV-PEFT's form, a plain `.pth` of named tensors, under our names.

    Its `.bone` and `.disha` are Bone row matrices where they have three axes, MiSS where they have two.
    """
    return {_our_name(name, tensor): tensor for name, tensor in load_base(path).items()}


def save_pth_adapter(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter in RWKV-PEFT's form; method, options and base are not in it."""
    save_base({_renamed(name, PTH_NAMES): tensor for name, tensor in tensors.items()}, path)


def _our_name(name: str, tensor: Tensor) -> str:
    kind = "miss" if tensor.ndim == 2 else "bone"
    return _renamed(name, {"disha": kind, "bone": kind})


def _renamed(name: str, last: Mapping[str, str]) -> str:
    """A qualified name with another last segment, where that has another name."""
    parent, dot, child = name.rpartition(".")
    return f"{parent}{dot}{last.get(child, child)}"
