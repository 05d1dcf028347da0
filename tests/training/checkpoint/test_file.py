"""The checkpoint file: reading returns what was written, and damage is always detected."""

from __future__ import annotations

import errno
import hashlib
import random

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.errors import CheckpointError
from rwkv_peft.training.checkpoint import file as checkpoints
from rwkv_peft.training.checkpoint.file import (
    checkpoint_path,
    list_checkpoints,
    prune,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)

MANIFEST = {"step": 7, "text": "ä\n", "nested": {"a": [1, 2.5, None]}}


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "model/a": torch.randn(3, 4),
        "half/a": torch.randn(3, 5).bfloat16(),
        "step": torch.tensor(3.0),
        "transposed": torch.randn(4, 6).T,
        "wide": torch.randn(7, dtype=torch.float64),
    }


@pytest.fixture
def path(tmp_path, tensors):
    path = checkpoint_path(tmp_path, 7)
    write_checkpoint(path, tensors, MANIFEST)
    return path


def test_reading_returns_what_was_written(path, tensors):
    found = read_checkpoint(path)
    assert found.manifest == MANIFEST == read_manifest(path)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_any_safetensors_reader_opens_it(path, tensors):
    theirs = load_file(path)
    checksum = theirs.pop("sha256")
    assert bytes(checksum.tolist()) == hashlib.sha256(path.read_bytes()[:-32]).digest()
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


def test_a_flipped_bit_is_detected(path):
    """In every byte of the length field and the checksum, and in every seventh of the other bytes."""
    good = path.read_bytes()
    places = {*range(0, len(good), 7), *range(len(good) - 32, len(good)), *range(16)}
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="step-000007"):
            read_checkpoint(path)
    path.write_bytes(good)
    read_checkpoint(path)


def test_a_truncated_file_is_detected(path):
    good = path.read_bytes()
    for length in (0, 1, 7, 8, 31, 33, 200, len(good) // 2, len(good) - 33, len(good) - 32, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            read_checkpoint(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(path)


def test_a_newer_format_is_refused(path, tensors, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 3)
    write_checkpoint(path, tensors, MANIFEST)
    monkeypatch.undo()
    for read in (read_checkpoint, read_manifest):
        with pytest.raises(
            CheckpointError, match=r"step-000007.*checkpoint format; found 3, expected 2 or less.*newer"
        ):
            read(path)


def test_the_state_of_parts_in_format_1_is_converted(path, tensors, monkeypatch):
    """Format 1 kept it under the class names of that time; classes whose state is no longer used are ignored."""
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 1)
    write_checkpoint(path, tensors, MANIFEST | {"callbacks": {"Validator": {"best": 2.5}, "StepRecorder": {}}})
    monkeypatch.undo()
    assert read_checkpoint(path).manifest["parts"] == {"validation": {"best": 2.5}}


def test_a_full_disk_leaves_the_old_file(path, tensors, monkeypatch):
    good = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(file, parts):
        file.write(b"half a file")
        raise full

    monkeypatch.setattr(checkpoints, "_write_hashed", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(path, tensors, {})
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_pruning_keeps_the_newest_up_to_a_step(tmp_path):
    for step in (1, 2, 3, 10, 20, 1234567):
        checkpoint_path(tmp_path, step).touch()
    (tmp_path / "step-notes.txt").touch()
    prune(tmp_path, 10, 2)
    assert list(list_checkpoints(tmp_path)) == [10, 3]
    assert (tmp_path / "step-notes.txt").exists()
