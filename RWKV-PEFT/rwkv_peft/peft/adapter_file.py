"""The adapter file: the trained tensors and everything needed to use them, in one `.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rwkv_peft.base_model import check_keys, load_base, same_base, save_base
from rwkv_peft.errors import CheckpointError
from rwkv_peft.files import atomic_write
from rwkv_peft.peft.injection import initial_factors

FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """Metadata of an adapter file."""

    method: str
    """Name of the method: the value of `--peft`."""
    options: Mapping[str, Any]
    """The method's options: r, mode, alpha, ..."""
    targets: list[str]
    """Qualified names of the layers with an adapter."""
    fingerprint: Mapping[str, Any]
    """Fingerprint of the base it was trained on (`base_model.fingerprint`)."""
    quant: str = "none"
    """Value of `--quant` in training."""
    dtype: str = "float32"
    """Dtype of the activations, and of the large matrices before quantization."""
    tokenizer: Mapping[str, Any] | None = None
    """Identity of the data's tokenizer; None if unknown."""
    format_version: int = FORMAT_VERSION


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter file by name: trainable parameters, and initial factors if a base needs them."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | initial_factors(model)


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter file atomically."""
    metadata = {key: json.dumps(value) for key, value in asdict(info).items()}
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, write_errors=(OSError, SafetensorError)) as temporary:
        save_file(plain, temporary, metadata=metadata)


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], AdapterInfo]:
    """Return the tensors and the metadata of an adapter file.

    Raises:
        CheckpointError: the file is missing, damaged, not an adapter of this program, or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(str(path), "is a folder" if path.is_dir() else "no such adapter file")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        if path.suffix == ".pth":
            refuse_base_model(load_base(path), path)
        raise CheckpointError(str(path), f"not a readable .safetensors ({error})") from error
    return tensors, _parse_info(metadata, str(path))


def _parse_info(metadata: Mapping[str, str], path: str) -> AdapterInfo:
    """Parse a file's metadata and check the type of every entry."""
    try:
        values = {key: json.loads(value) for key, value in metadata.items()}
    except json.JSONDecodeError as error:
        raise CheckpointError(path, "is not an adapter of this program: its metadata is not JSON") from error
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        what, expected = "was written by a newer version of this program", f"at most {FORMAT_VERSION}"
        raise CheckpointError(path, what, found=f"format {version}", expected=expected, hint="Update the program.")
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
            raise CheckpointError(path, f"damaged metadata: {key} is {values.get(key)!r}")
    named = all(isinstance(name, str) for name in values["targets"])
    if not named or set(values["fingerprint"]) != {"shapes", "dtypes", "samples"}:
        raise CheckpointError(path, "damaged metadata: targets or fingerprint")
    return AdapterInfo(**{key: values[key] for key in (*kinds, "format_version")})


def refuse_base_model(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError if tensors that should be an adapter's are those of a whole model."""
    if {"emb.weight", "blocks.0.att.key.weight"} <= tensors.keys():
        hint = "Give the file that a run writes: rwkv-N.safetensors."
        raise CheckpointError(str(path), "this is a base model, not an adapter", hint=hint)


def check_same_base(info: AdapterInfo, fingerprint: Mapping[str, Any], adapter: str | Path, base: str | Path) -> None:
    """Raise CheckpointError unless the adapter was trained on this base."""
    if not same_base(info.fingerprint, fingerprint):
        raise CheckpointError(
            str(adapter), f"was trained on a base other than {base}", hint="Pass the base it was trained on."
        )


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy an adapter file's tensors into a model with the same adapter.

    Raises:
        CheckpointError: names or shapes differ, or a value is NaN or infinite.
    """
    places = {name: p for name, p in model.named_parameters() if p.requires_grad} | initial_factors(model)
    check_keys(
        {name: place.shape for name, place in places.items()}, tensors, path, what="adapter and its --train_parts"
    )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(str(path), f"{name} has values that are not finite", hint="Use an earlier adapter.")
    for name, tensor in tensors.items():
        places[name].data.copy_(tensor)


PTH_NAMES = {"miss": "disha"}
"""Parameters that have another name in RWKV-PEFT: our name -> its name."""


def read_pth_adapter(path: str | Path) -> dict[str, Tensor]:
    """Read an adapter in RWKV-PEFT's form, a plain `.pth` of named tensors, and return it under our names.

    A `.bone` or `.disha` tensor with three axes is Bone row, with two axes MiSS.
    """
    tensors = load_base(path)
    refuse_base_model(tensors, path)
    return {_our_name(name, tensor): tensor for name, tensor in tensors.items()}


def save_pth_adapter(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter in RWKV-PEFT's form, which does not state the method, its options and the base."""
    save_base({_renamed(name, PTH_NAMES): tensor for name, tensor in tensors.items()}, path)


def _our_name(name: str, tensor: Tensor) -> str:
    kind = "miss" if tensor.ndim == 2 else "bone"
    return _renamed(name, {"disha": kind, "bone": kind})


def _renamed(name: str, last: Mapping[str, str]) -> str:
    """Return a qualified name with its last segment replaced, if `last` has a replacement."""
    parent, dot, child = name.rpartition(".")
    return f"{parent}{dot}{last.get(child, child)}"
