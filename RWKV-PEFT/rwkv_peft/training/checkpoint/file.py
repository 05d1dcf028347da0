"""The checkpoint file: everything a run needs to go on, in one `.safetensors` that carries its own checksum.

    step-000123.safetensors    header: names, shapes, and the manifest as JSON in its metadata
                               tensors, the last of them `sha256` over every byte before it

One file appears at once (written beside, flushed, renamed), so there is no half a checkpoint. Any .safetensors reader
opens it. It is written here by hand, in pieces, since the library's writer keeps Python, and so training, waiting.
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

from rwkv_peft.base_model import write_atomically
from rwkv_peft.errors import CheckpointError

FORMAT_VERSION = 1

FOLDER = "checkpoints"
"""Below the run's folder."""

CHECKSUM = "sha256"
"""Name of the tensor that holds it."""

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
    """A checkpoint that was read, and found whole."""

    path: Path
    manifest: Mapping[str, Any]
    tensors: dict[str, Tensor]
    """On the CPU, by name; whoever has put the last of them back clears it."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Of the checkpoint after `step` optimizer steps, in a folder of checkpoints."""
    return folder / f"step-{step:06d}.safetensors"


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, good or not, the newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return dict(sorted(found, reverse=True))


def prune(folder: Path, newest: int, keep: int) -> None:
    """Keep `keep` checkpoints from step `newest` down. Later ones are of a course that the run has left."""
    steps = list_checkpoints(folder)
    kept = [step for step in steps if step <= newest][:keep]
    for step, path in steps.items():
        if step not in kept:
            _remove(path)


def remove_all(folder: Path) -> None:
    """Every checkpoint in a folder."""
    for path in list_checkpoints(folder).values():
        _remove(path)


def remove_leftovers(folder: Path) -> None:
    """What runs that were killed while they wrote have left."""
    for path in folder.glob(".step-*.tmp"):
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the next time, then
        path.unlink()


# ------------------------------------------------------------------------------------------- writing


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: see `checkpoint_path`.
        tensors: on the CPU; they must not change meanwhile.
        manifest: anything that JSON holds.
    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    # Wider numbers first: every tensor then lies at a multiple of its own width.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write_hashed(file, [_header(ordered, manifest), *map(_bytes_of, ordered.values())])

    write_atomically(path, write)


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
            checksum.update(piece)  # neither holds up other threads
            file.write(piece)
    file.write(checksum.digest())


# ------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it.

    Raises:
        CheckpointError: missing, damaged, cut off, no checkpoint, or of another format.
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
    """What a checkpoint says of itself, unchecked and without its tensors.

    Raises:
        CheckpointError: unreadable, or of another format.
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
            raise CheckpointError(str(path), "damaged or cut off: its checksum does not fit")


def _pieces(read: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    while count > 0 and (piece := read(min(_PIECE, count))):
        count -= len(piece)
        yield piece


def _manifest(path: Path, metadata: Mapping[str, str] | None) -> Mapping[str, Any]:
    version = (metadata or {}).get("format_version")
    if version != str(FORMAT_VERSION) or "manifest" not in metadata:
        expected = f"format {FORMAT_VERSION}"
        raise CheckpointError(str(path), "no checkpoint of this program", found=f"format {version}", expected=expected)
    try:
        return json.loads(metadata["manifest"])
    except json.JSONDecodeError as error:
        raise CheckpointError(str(path), "its manifest is not JSON") from error
