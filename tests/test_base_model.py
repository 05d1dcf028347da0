"""Base model files: loading, errors for other files, fingerprints, and atomic writing."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from rwkv_peft import base_model
from rwkv_peft.base_model import BaseModel, check_keys, fingerprint, load_base, same_base, save_base, shape_of
from rwkv_peft.errors import CheckpointError
from rwkv_peft.model.init import model_on_meta
from tests.helpers import TINY, lively_model, write_base


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_shape_is_read_from_the_file(tmp_path):
    path = write_base(tmp_path / "base.pth", TINY, dtype=torch.bfloat16)
    assert shape_of(load_base(path), path) == TINY


def test_an_open_base_model_computes_each_property_once(tmp_path, monkeypatch):
    path = write_base(tmp_path / "base.pth", TINY, dtype=torch.bfloat16)
    opened = BaseModel.open(str(path))
    assert (opened.path, opened.shape, opened.has_time_state) == (path, TINY, False)
    assert opened.fingerprint == fingerprint(load_base(path))
    for name in ("load_base", "shape_of", "fingerprint"):
        monkeypatch.setattr(base_model, name, None)  # a second call would fail
    assert opened.shape is opened.shape
    assert opened.fingerprint is opened.fingerprint


def test_an_open_base_model_reports_its_time_states(tmp_path):
    states = {f"blocks.{n}.att.time_state": torch.zeros(2, 32, 32) for n in range(2)}
    save_base(lively_model().state_dict() | states, tmp_path / "tuned.pth")
    assert BaseModel.open(tmp_path / "tuned.pth").has_time_state


def test_opening_reports_a_model_of_another_kind_by_its_path(tmp_path):
    torch.save({"blocks.0.att.r_k": torch.zeros(1)}, tmp_path / "seven.pth")
    with pytest.raises(CheckpointError, match=r"seven.pth: wrong kind of model; found RWKV-7"):
        _ = BaseModel.open(tmp_path / "seven.pth").shape


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_malicious_pickle_does_not_execute(save, tmp_path):
    path = tmp_path / "evil.pth"
    save({"emb.weight": Malice(tmp_path / "executed")}, path)
    with pytest.raises(CheckpointError, match=r"evil.pth: refused"):
        load_base(path)
    assert not (tmp_path / "executed").exists()


def test_old_torch_format_loads(tmp_path):
    torch.save({"x": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_base(tmp_path / "old.pth")["x"], torch.ones(3))


@pytest.mark.parametrize("keep", [0, 10, 1000, -1000, -1])
def test_truncated_files(keep, tmp_path):
    path = write_base(tmp_path / "base.pth")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"base.pth: (cannot be read|refused)"):
        load_base(path)


def test_missing_files_and_other_content(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.pth: no such file"):
        load_base(tmp_path / "none.pth")
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="not a model file; expected a dict of names"):
        load_base(tmp_path / "nested.pth")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["blocks.0.att.r_k", "blocks.0.att.x_r"], "RWKV-7"),
        (["blocks.0.att.time_mix_k", "blocks.0.att.ln_x.weight"], "RWKV-5"),
        (["blocks.0.att.time_mix_k", "blocks.0.att.time_first"], "RWKV-4"),
        (["blocks.0.att.time_maa_x", "blocks.0.att.gate_w1"], "an experimental RWKV-6"),
        (["blocks.0.att.key.bone"], "an adapter without its base"),
        (["layers.0.q_proj.weight"], r"not an RWKV model \(first keys: layers.0.q_proj.weight\)"),
    ],
)
def test_the_error_names_the_kind_of_model(keys, name):
    state = (
        {key: torch.zeros(1) for key in ["emb.weight", *keys]} if "first keys" not in name else {keys[0]: torch.ones(1)}
    )
    with pytest.raises(CheckpointError, match=f"found {name}"):
        shape_of(state, "model.pth")


def test_missing_unknown_and_misshapen_keys():
    state = lively_model().state_dict()
    expected = {key: tensor.shape for key, tensor in model_on_meta(TINY).state_dict().items()}
    check_keys(expected, state, "base.pth")
    without = {key: t for key, t in state.items() if key != "blocks.1.att.gate.weight"}
    with pytest.raises(CheckpointError, match=r"missing: blocks.1.att.gate.weight"):
        check_keys(expected, without, "base.pth")
    with pytest.raises(CheckpointError, match=r"unknown: blocks.0.att.key.bone"):
        check_keys(expected, state | {"blocks.0.att.key.bone": torch.ones(1)}, "base.pth")
    with pytest.raises(CheckpointError, match=r"ln_out.bias has the wrong shape; found \(3,\), expected \(64,\)"):
        check_keys(expected, state | {"ln_out.bias": torch.ones(3)}, "base.pth")
    with pytest.raises(CheckpointError, match=r"incomplete RWKV-6 model; missing head.weight"):
        shape_of({key: t for key, t in state.items() if key != "head.weight"}, "base.pth")


def test_fingerprint_identifies_a_base_in_any_dtype():
    state = lively_model().state_dict()
    original = fingerprint(state)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_base(original, fingerprint({key: t.to(dtype) for key, t in state.items()}))
    assert not same_base(original, fingerprint(lively_model(seed=1).state_dict()))
    tuned = dict(state)
    tuned["blocks.1.att.key.weight"] = state["blocks.1.att.key.weight"] * 1.1
    assert not same_base(original, fingerprint(tuned)), "a base with one changed matrix is another base"


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    save_base({"b": torch.ones(2), "a": torch.zeros(1)}, path)
    assert list(load_base(path)) == ["b", "a"], "the order of the keys is kept"
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_base({"a": torch.ones(9)}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"], "no temporary file is left"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "a web page or text"),
        (b'{"error": "not found"}', "a web page or text"),
        ((100).to_bytes(8, "little") + b'{"x":1}', "a .safetensors file"),
        (b"just some text", "damaged or truncated"),
        (b"\x80", "refused"),
    ],
)
def test_the_error_describes_a_file_that_is_not_a_model(content, what, tmp_path):
    """The message is not torch's, which advises to disable its protection."""
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        load_base(tmp_path / "x.pth")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{1: torch.ones(2)}, {"x": torch.ones(2, dtype=torch.int8)}, {"x": torch.eye(2).to_sparse()}]
)
def test_other_kinds_of_tensors_are_rejected(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="not a model file"):
        load_base(tmp_path / "odd.pth")


def test_the_error_reports_a_vector_in_place_of_a_matrix():
    state = lively_model().state_dict()
    with pytest.raises(CheckpointError, match=r"time_faaaa has the wrong shape; found \(64,\), expected a matrix"):
        shape_of(state | {"blocks.0.att.time_faaaa": torch.zeros(64)}, "base.pth")


def test_a_folder_is_rejected(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        load_base(tmp_path)


def test_a_slightly_different_base_is_another_base():
    """For example a merged file: merging the adapter again would apply it twice."""
    state = lively_model().state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        stored = {key: tensor.to(dtype) for key, tensor in state.items()}
        moved = stored | {"blocks.0.att.key.weight": stored["blocks.0.att.key.weight"] * 1.01}
        assert not same_base(fingerprint(stored), fingerprint(moved))


@pytest.mark.parametrize("elements", [1, 9, 65536 * 768, 65536 * 2048])
def test_a_fingerprint_samples_large_matrices_to_the_end(elements):
    """In fp32, the last index of 65536 x 768 elements would be rounded to one past the end."""
    zeros = torch.zeros(1).expand(elements)  # needs no memory
    samples = fingerprint({"emb.weight": zeros})["samples"][0]
    assert samples == [0.0] * min(8, elements)
