"""Base model files: safe loading, recognising what a file is, fingerprints, atomic writing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_peft.config import ModelConfig
from rwkv_peft.errors import CheckpointError

SAMPLES_PER_TENSOR = 4
RELATIVE_TOLERANCE = 2e-2
"""Twice what a bf16 or fp16 copy of an fp32 value can differ by."""


def load_base(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, memory-mapped, in file order. Nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, or not a plain dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(str(path), "no such file", hint="Check --load_model / --base_model.")
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            str(path), "refused: the file holds more than plain tensors, or is not a .pth", hint=_first_line(error)
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            str(path), f"cannot be read, probably cut off ({path.stat().st_size} bytes)", hint="Download it again."
        ) from error
    plain = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    if not plain or not content:
        raise CheckpointError(str(path), "not a model file", expected="a dict of tensors, as RWKV's .pth files are")
    return content


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
    needed = (
        "emb.weight head.weight blocks.0.att.time_maa_w1 blocks.0.att.time_decay_w1 blocks.0.att.time_faaaa "
        "blocks.0.att.key.weight blocks.0.ffn.key.weight"
    )
    missing = [key for key in needed.split() if key not in state]
    if missing:
        raise CheckpointError(path, f"incomplete RWKV-6: {', '.join(missing)} missing")


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
    return f"no RWKV (first keys: {', '.join(list(state)[:3])})"


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
    samples = [float(f"{value:.4g}") for key in keys for value in _samples(state[key])]
    return {"shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16], "samples": samples}


def _samples(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, min(SAMPLES_PER_TENSOR, flat.numel())).long()
    return flat[where].float().tolist()


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """True where two fingerprints are of one model, stored in whatever dtypes."""
    if a["shapes"] != b["shapes"] or len(a["samples"]) != len(b["samples"]):
        return False
    pairs = zip(a["samples"], b["samples"], strict=True)
    return all(abs(x - y) <= RELATIVE_TOLERANCE * max(abs(x), abs(y)) + 1e-7 for x, y in pairs)


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
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers make private files
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(str(path), f"cannot be written ({_first_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
