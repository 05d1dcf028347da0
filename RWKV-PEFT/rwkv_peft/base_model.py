"""Base model files (`.pth`): loading without executing code, identifying the model, fingerprints, and saving."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.files import atomic_write

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError,
)  # fmt: skip
"""The exceptions that torch.load may raise for files that are not checkpoints."""

SAMPLES_PER_TENSOR = 8
"""Number of values of each tensor in a fingerprint."""

SHAPE_KEYS = (
    "emb.weight",
    "head.weight",
    "blocks.0.att.time_maa_w1",
    "blocks.0.att.time_decay_w1",
    "blocks.0.att.time_faaaa",
    "blocks.0.att.key.weight",
    "blocks.0.ffn.key.weight",
)
"""The matrices from which a model's shape is read."""


@dataclass(frozen=True, eq=False)
class BaseModel:
    """An open base model file. Values derived from its tensors are computed on first use and cached.

    Open the file once with `BaseModel.open` and pass the object on.
    """

    path: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
    """The file's tensors, memory-mapped, in file order."""

    @classmethod
    def open(cls, path: str | Path) -> BaseModel:
        """Open a `.pth` file. Only its index is read now; the tensors' values are read when they are used.

        Raises:
            CheckpointError: the file is missing, truncated, or not a plain dict of tensors.
        """
        return cls(Path(path), load_base(path))

    @cached_property
    def shape(self) -> ModelConfig:
        """The model's shape. Raises CheckpointError if the file is not a complete RWKV-6 model."""
        return shape_of(self.tensors, self.path)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identifies this model in any floating-point dtype; compare with `same_base`."""
        return fingerprint(self.tensors)

    @cached_property
    def has_time_state(self) -> bool:
        """Whether the file holds tuned initial states (`blocks.N.att.time_state`)."""
        return bool(time_states(self.tensors))


def load_base(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` file, memory-mapped and in file order. No code in the file is executed.

    Raises:
        CheckpointError: the file is missing, truncated, or not a plain dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            str(path), "this is a folder" if path.is_dir() else "no such file", expected="a .pth model file"
        )
    try:
        content = _torch_load(path)
    except UNREADABLE as error:
        what, hint = _refusal(path)
        raise CheckpointError(str(path), what, hint=hint) from error
    plain = isinstance(content, dict) and all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        for key, value in content.items()
    )
    if not plain or not content:
        expected = "a dict of names and dense floating-point tensors"
        raise CheckpointError(str(path), "not a model file", expected=expected)
    return content


def _first_bytes(path: Path, count: int = 64) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _refusal(path: Path) -> tuple[str, str]:
    """Return what is wrong with a file that torch cannot load, judged by its first bytes, and how to fix it."""
    head = _first_bytes(path)
    size = f"{path.stat().st_size} bytes"
    if head.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the model", "Run: git lfs pull"
    if head.lstrip()[:1] in (b"<", b"{"):
        return "this is a web page or text, not a model", "Download the .pth file itself."
    if head[8:9] == b"{":
        return "this is a .safetensors file, not a .pth file", "Use a base model in RWKV's .pth format."
    if (head.startswith(b"PK") and zipfile.is_zipfile(path)) or head.startswith(b"\x80"):
        what = f"refused, because it contains more than plain tensors or is truncated ({size})"
        return what, "No code in it was executed."
    return f"cannot be read; it is damaged or truncated ({size})", "Download it again."


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)  # torch's old format cannot be memory-mapped


def shape_of(state: Mapping[str, Tensor], path: str | Path) -> ModelConfig:
    """Return the model's shape, read from its tensors. `path` is only for error messages.

    Raises:
        CheckpointError: the tensors are an adapter, another RWKV generation, or not an RWKV model.
    """
    _refuse_other_models(state, str(path))
    maa_w1, decay_w1 = state["blocks.0.att.time_maa_w1"], state["blocks.0.att.time_decay_w1"]
    n_head, head_size = state["blocks.0.att.time_faaaa"].shape
    layers = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    return ModelConfig(
        n_layer=max(layers) + 1,
        n_embd=state["emb.weight"].shape[1],
        vocab_size=state["emb.weight"].shape[0],
        head_size=head_size,
        dim_att=n_head * head_size,
        dim_ffn=state["blocks.0.ffn.key.weight"].shape[0],
        time_mix_rank=maa_w1.shape[1] // 5,
        time_decay_rank=decay_w1.shape[1],
    )


def _refuse_other_models(state: Mapping[str, Tensor], path: str) -> None:
    found = _generation(state)
    if found != "RWKV-6":
        raise CheckpointError(
            path,
            "wrong kind of model",
            found=found,
            expected="RWKV-6 (x060)",
            hint='See docs/training.md, "Base models".',
        )
    missing = [key for key in SHAPE_KEYS if key not in state]
    if missing:
        raise CheckpointError(path, f"incomplete RWKV-6 model; missing {', '.join(missing)}")
    for key in SHAPE_KEYS:
        if state[key].ndim != 2:
            raise CheckpointError(
                path, f"{key} has the wrong shape", found=tuple(state[key].shape), expected="a matrix"
            )


def _generation(state: Mapping[str, Tensor]) -> str:
    """Return what a state dict is, judged by the keys that differ between RWKV generations."""

    def has(suffix: str) -> bool:
        return any(key.endswith(suffix) for key in state)

    if has(".att.r_k") or has(".att.x_r"):
        return "RWKV-7"
    if has(".att.gate_w1") or has(".att.time_maa_rkvw_w1"):
        return "an experimental RWKV-6 (x060a/x060b)"
    if has(".att.time_maa_x"):
        return "RWKV-6"
    if has(".att.time_mix_k"):
        return "RWKV-5" if has(".att.ln_x.weight") else "RWKV-4"
    if has(".bone") or has(".disha") or has(".lora_A"):
        return "an adapter without its base"
    if has(".att.time_state"):
        return "a tuned state without its base (rwkv-peft merge combines them)"
    return f"not an RWKV model (first keys: {', '.join(list(state)[:3])})"


def time_states(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors trained by state tuning: `blocks.N.att.time_state`, (H, N, N), indexed [value][key]."""
    return {key: tensor for key, tensor in state.items() if key.endswith(".att.time_state")}


def check_keys(
    expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: str | Path, what: str = "RWKV-6"
) -> None:
    """Raise CheckpointError unless names and shapes are equal. `what` names the expected kind of file in the error."""
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing or extra:
        lists = [f"{label}: {_few(keys)}" for label, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise CheckpointError(str(path), f"the keys do not match this {what}: {'; '.join(lists)}")
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise CheckpointError(
                str(path), f"{key} has the wrong shape", found=tuple(state[key].shape), expected=tuple(shape)
            )


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


# --------------------------------------------------------------------------------------- fingerprint


def fingerprint(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a summary that identifies a base model in any floating-point dtype; compare two with `same_base`.

    It holds a hash of all names and shapes, and the dtype and a few values of each tensor.
    """
    keys = sorted(state)
    shapes = json.dumps([[key, list(state[key].shape)] for key in keys])
    return {
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "dtypes": [str(state[key].dtype).removeprefix("torch.") for key in keys],
        "samples": [_samples(state[key]) for key in keys],
    }


def _samples(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    where = torch.linspace(
        0, flat.numel() - 1, count, dtype=torch.float64
    ).long()  # in fp32 the last index could be out of range
    return flat[where].double().tolist()


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Return whether two fingerprints describe the same model, possibly stored in different dtypes.

    Values of the same dtype must be equal. Values of different dtypes may differ by one step of the coarser dtype,
    because one value may be the other one rounded.
    """
    if a["shapes"] != b["shapes"]:
        return False
    tensors = zip(a["dtypes"], b["dtypes"], a["samples"], b["samples"], strict=True)
    return all(_same_values(torch.tensor(x), torch.tensor(y), _step(da, db)) for da, db, x, y in tensors)


def _same_values(a: Tensor, b: Tensor, step: float) -> bool:
    # Below fp16's smallest normal value its steps have a constant width of 6e-8.
    return torch.equal(a, b) if step == 0 else torch.allclose(a, b, rtol=step, atol=1e-7)


def _step(a: str, b: str) -> float:
    """Return the relative step of the coarser of two dtypes; 0 if they are the same."""
    return 0.0 if a == b else max(torch.finfo(getattr(torch, name)).eps for name in (a, b))


# -------------------------------------------------------------------------------------------- saving


def save_base(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.pth` file that any RWKV program can load. The write is atomic, and the order of keys is kept.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_write(path, write_errors=(OSError, RuntimeError)) as temporary:  # torch.save raises RuntimeError
        torch.save(plain, temporary)
