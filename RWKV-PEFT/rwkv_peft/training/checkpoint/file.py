"""The checkpoint file: everything a run needs to resume, in one `.safetensors` with its own checksum.

    step-000123.safetensors    header: names, shapes, and the manifest as JSON in its metadata
                               tensors, the last of them `sha256` over every byte before it

The file is written under a temporary name, flushed and renamed, so a checkpoint is never incomplete. Any .safetensors
reader opens it. It is written piece by piece, because the library's own writer holds Python's global lock, and training
would have to wait.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rwkv_peft.errors import CheckpointError
from rwkv_peft.files import atomic_write

FORMAT_VERSION = 2
"""2 (this version): state under "parts", by explicit keys. 1: state under "callbacks", by class names."""

FOLDER = "checkpoints"
"""Name of the checkpoints' folder in the run's folder."""

CHECKSUM = "sha256"
"""Name of the tensor with the checksum."""

_NAME = re.compile(r"step-(\d+)\.safetensors")
_PIECE = 2**24
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    manifest: Mapping[str, Any]
    tensors: dict[str, Tensor]
    """On the CPU, by name; cleared once they are restored, to free memory."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps in a folder of checkpoints."""
    return folder / f"step-{step:06d}.safetensors"


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by step, newest first, without verifying them."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return dict(sorted(found, reverse=True))


def prune(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`, and all later ones.

    Later ones belong to a continuation that was abandoned when the run resumed from an earlier step.
    """
    steps = list_checkpoints(folder)
    kept = [step for step in steps if step <= newest][:keep]
    for step, path in steps.items():
        if step not in kept:
            _remove(path)


def remove_all(folder: Path) -> None:
    """Delete every checkpoint in a folder."""
    for path in list_checkpoints(folder).values():
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the next call tries again
        path.unlink()


# ------------------------------------------------------------------------------------------- writing


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: see `checkpoint_path`.
        tensors: on the CPU; they must not change until this returns.
        manifest: serializable as JSON.
    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    # Wider dtypes first, so that every tensor is aligned to its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))

    with atomic_write(path) as temporary, temporary.open("wb") as file:
        _write_hashed(file, [_header(ordered, manifest), *map(_bytes_of, ordered.values())])


def _header(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> bytes:
    metadata = {"format_version": str(FORMAT_VERSION), "manifest": json.dumps(manifest)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    length = hashlib.new(CHECKSUM).digest_size
    header[CHECKSUM] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_hashed(file: BinaryIO, parts: Iterable[bytes | memoryview]) -> None:
    checksum = hashlib.new(CHECKSUM)
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            checksum.update(piece)  # both release the global lock
            file.write(piece)
    file.write(checksum.digest())


# ------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Raises:
        CheckpointError: the file is missing, damaged, truncated, not a checkpoint, or of a newer format.
    """
    try:
        _verify(path)
        with safe_open(path, framework="pt") as handle:
            manifest = _manifest(path, handle.metadata())
            names = [name for name in handle.keys() if name != CHECKSUM]  # noqa: SIM118 (not a dict)
            return Checkpoint(path, manifest, {name: handle.get_tensor(name) for name in names})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"not a readable checkpoint ({error})") from error


def read_manifest(path: Path) -> Mapping[str, Any]:
    """Read only the manifest of a checkpoint, without verifying the file.

    Raises:
        CheckpointError: unreadable, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            return _manifest(path, handle.metadata())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"not a readable checkpoint ({error})") from error


def _verify(path: Path) -> None:
    checksum = hashlib.new(CHECKSUM)
    with path.open("rb") as file:
        body = path.stat().st_size - checksum.digest_size
        for piece in _pieces(file.read, body):
            checksum.update(piece)
        if body < 0 or file.read() != checksum.digest():
            raise CheckpointError(str(path), "damaged or truncated: its checksum does not match")


def _pieces(read: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    while count > 0 and (piece := read(min(_PIECE, count))):
        count -= len(piece)
        yield piece


def _manifest(path: Path, metadata: Mapping[str, str] | None) -> Mapping[str, Any]:
    """Parse the manifest and convert that of an earlier format to the current one."""
    version = (metadata or {}).get("format_version")
    if version is None or "manifest" not in metadata:
        raise CheckpointError(str(path), "not a checkpoint of this program")
    if version not in ("1", str(FORMAT_VERSION)):
        hint = "A newer version of this program wrote it: update, or resume with that version."
        raise CheckpointError(
            str(path), "unknown checkpoint format", found=version, expected=f"{FORMAT_VERSION} or less", hint=hint
        )
    try:
        manifest = json.loads(metadata["manifest"])
    except json.JSONDecodeError as error:
        raise CheckpointError(str(path), "its manifest is not JSON") from error
    return _from_format_1(manifest) if version == "1" else manifest


def _from_format_1(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a manifest of format 1, which has the state of parts under the names of their classes."""
    parts = {"Validator": "validation"}
    callbacks = manifest["callbacks"]
    return {**manifest, "parts": {parts[name]: state for name, state in callbacks.items() if name in parts}}
