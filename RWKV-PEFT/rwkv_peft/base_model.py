"""Base model files: safe loading, recognising what a file is, fingerprints, atomic writing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.errors import CheckpointError
from rwkv_peft.files import sync_folder

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError,
)  # fmt: skip
"""What torch.load raises on files that are no checkpoints, depending on their bytes."""

SAMPLES_PER_TENSOR = 8
"""Values of each tensor that a fingerprint keeps."""

SHAPE_KEYS = (
    "emb.weight",
    "head.weight",
    "blocks.0.att.time_maa_w1",
    "blocks.0.att.time_decay_w1",
    "blocks.0.att.time_faaaa",
    "blocks.0.att.key.weight",
    "blocks.0.ffn.key.weight",
)
"""The matrices that a model's shape is read from."""


def load_base(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, memory-mapped, in file order. Nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, or not a plain dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            str(path), "is a folder" if path.is_dir() else "no such file", expected="a .pth model file"
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
        expected = "a dict of named, dense floating-point tensors, as RWKV's .pth files are"
        raise CheckpointError(str(path), "not a model file", expected=expected)
    return content


def _first_bytes(path: Path, count: int = 64) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _refusal(path: Path) -> tuple[str, str]:
    """Why a file that torch would not load is none of ours, by its first bytes; and the way out."""
    head = _first_bytes(path)
    size = f"{path.stat().st_size} bytes"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the model", "Fetch the file itself: git lfs pull."
    if head.lstrip()[:1] in (b"<", b"{"):
        return "a web page or text, not a model", "Download the .pth file itself."
    if head[8:9] == b"{":
        return "a .safetensors file, not a .pth", "Give a base model in RWKV's .pth format."
    if (head.startswith(b"PK") and zipfile.is_zipfile(path)) or head.startswith(b"\x80"):
        return f"refused: it holds more than plain tensors, or is cut off ({size})", "Nothing in it was executed."
    return f"cannot be read, damaged or cut off ({size})", "Download it again."


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)  # torch's old format cannot be mapped


def shape_of(state: Mapping[str, Tensor], path: str | Path) -> ModelConfig:
    """The model's shape, read off its tensors.

    Raises:
        CheckpointError: an RWKV of another generation (named), an adapter, or no RWKV at all.
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
            path, "wrong kind of model", found=found, expected="RWKV-6 (x060)", hint="See README: Base models."
        )
    missing = [key for key in SHAPE_KEYS if key not in state]
    if missing:
        raise CheckpointError(path, f"incomplete RWKV-6: {', '.join(missing)} missing")
    for key in SHAPE_KEYS:
        if state[key].ndim != 2:
            raise CheckpointError(path, f"{key} has another shape", found=tuple(state[key].shape), expected="a matrix")


def _generation(state: Mapping[str, Tensor]) -> str:
    """What a state dict is, by the keys that tell the generations apart."""

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
        return "a tuned state without its base (tools/merge.py puts both together)"
    return f"no RWKV (first keys: {', '.join(list(state)[:3])})"


def time_states(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a model's tensors state tuning trains: `blocks.N.att.time_state`, (H, N, N), [value][key]."""
    return {key: tensor for key, tensor in state.items() if key.endswith(".att.time_state")}


def check_keys(
    expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: str | Path, what: str = "RWKV-6"
) -> None:
    """Raise CheckpointError unless names and shapes agree exactly; `what` says what the keys should have been."""
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing or extra:
        lists = [f"{label}: {_few(keys)}" for label, keys in (("missing", missing), ("unknown", extra)) if keys]
        raise CheckpointError(str(path), f"keys do not fit this {what}: {'; '.join(lists)}")
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise CheckpointError(
                str(path), f"{key} has another shape", found=tuple(state[key].shape), expected=tuple(shape)
            )


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


# --------------------------------------------------------------------------------------- fingerprint


def fingerprint(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells one base from another whatever dtype it is stored in: names, shapes, and a few values of each."""
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
    where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()  # fp32 would go past the end
    return flat[where].double().tolist()


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """True where two fingerprints are of one model, stored in whatever dtypes.

    Values of one dtype must be equal; of two dtypes, equal to a step of the coarser, since one is the other rounded.
    """
    if a["shapes"] != b["shapes"]:
        return False
    tensors = zip(a["dtypes"], b["dtypes"], a["samples"], b["samples"], strict=True)
    return all(_same_values(torch.tensor(x), torch.tensor(y), _step(da, db)) for da, db, x, y in tensors)


def _same_values(a: Tensor, b: Tensor, step: float) -> bool:
    # Below fp16's smallest normal number its steps are absolute, 6e-8 wide.
    return torch.equal(a, b) if step == 0 else torch.allclose(a, b, rtol=step, atol=1e-7)


def _step(a: str, b: str) -> float:
    """Relative step of the coarser of two dtypes; 0 where they are the same."""
    return 0.0 if a == b else max(torch.finfo(getattr(torch, name)).eps for name in (a, b))


# -------------------------------------------------------------------------------------------- saving


def save_base(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.pth` that any RWKV program loads, whole or not at all; the key order is kept."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_atomically(path, lambda temporary: torch.save(plain, temporary))


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk, then rename it into place.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers make private files
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # writers have their own ways to report a full disk
        raise CheckpointError(str(path), f"cannot be written ({_first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
