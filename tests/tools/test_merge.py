"""The main job end to end, with the programs that a user runs; the result is compared with the `rwkv` package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rwkv_peft.adapted_model import load_with_adapter
from rwkv_peft.base_model import fingerprint, load_base, save_base
from rwkv_peft.commands import merge as command
from rwkv_peft.errors import UserError
from rwkv_peft.export.merge import merge
from rwkv_peft.peft.adapter_file import AdapterInfo, save_adapter
from tests.helpers import TINY, relative_error, with_shape, write_base

ROOT = Path(__file__).resolve().parents[2]


def program(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def client(path: Path):
    """Load a model with the `rwkv` package."""
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_CUDA_ON"] = "0"
    from rwkv.model import RWKV

    return RWKV(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bone", '{"r":32}'),
        pytest.param("bone", '{"r":16,"mode":"col"}', marks=pytest.mark.slow),
        pytest.param("bone", '{"r":16,"mode":"left"}', marks=pytest.mark.slow),
        pytest.param("lora", '{"r":8,"alpha":16}', marks=pytest.mark.slow),
    ],
)
def test_convert_train_merge_and_the_rwkv_package_agrees(method, options, tmp_path):
    """The three commands of the README on a small model; the `time` and `ln` parts are trained too."""
    base = write_base(tmp_path / "base.pth", with_shape(vocab_size=257))
    lines = [json.dumps({"text": f"User: 数 {n}?\n\nAssistant: It is {n * n}."}) for n in range(64)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    steps = [
        ("tools/json2binidx.py", "--input", tmp_path / "chat.jsonl", "--output_prefix", tmp_path / "data/chat",
         "--tokenizer", "bytes"),
        ("train.py", "--load_model", base, "--data_file", tmp_path / "data/chat", "--data_type", "binidx",
         "--ctx_len", 40, "--micro_bsz", 4, "--epoch_steps", 20, "--epoch_count", 1, "--lr_init", 2e-3,
         "--lr_final", 2e-3, "--proj_dir", tmp_path / "out", "--peft", method, f"--{method}_config", options,
         "--train_parts", "time", "ln"),
        ("tools/merge.py", "--base_model", base, "--adapter", tmp_path / "out/rwkv-0.safetensors",
         "--output", tmp_path / "merged.pth"),
    ]  # fmt: skip
    for step in steps:
        result = program(*step)
        assert result.returncode == 0, result.stderr
    assert "stored as float32; 100.0 % of the update is kept" in result.stdout

    ids = torch.randint(257, (29,), generator=torch.Generator().manual_seed(0)).tolist()
    unmerged = load_with_adapter(base, tmp_path / "out/rwkv-0.safetensors").model
    with torch.no_grad():
        ours = unmerged(torch.tensor([ids]))[0][0]
    theirs = client(tmp_path / "merged.pth").forward(ids, None, full_output=True)[0]
    untrained = client(base).forward(ids, None, full_output=True)[0]
    assert (ours - theirs).abs().max() < 1e-3
    assert (theirs - untrained).abs().max() > 0.1, "training must change the model"
    # The rwkv package depends on the order of the keys.
    assert list(load_base(tmp_path / "merged.pth")) == list(load_base(base))


def write_adapter(path: Path, base: Path, size: float) -> Path:
    """A Bone adapter of random values on every target of `base`."""
    state = load_base(base)
    targets = [f"blocks.{n}.{name}" for n in range(2) for name in ("att.key", "ffn.value")]
    torch.manual_seed(0)
    tensors = {f"{t}.bone": size * torch.randn(state[f"{t}.weight"].shape[1] // 16, 16, 16) for t in targets}
    info = AdapterInfo(method="bone", options={"r": 16, "mode": "row"}, targets=targets, fingerprint=fingerprint(state))
    save_adapter(path, tensors, info)
    return path


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_base_by_default(base_dtype, dtype, tmp_path):
    base = write_base(tmp_path / "base.pth", TINY, dtype=base_dtype)
    adapter = write_adapter(tmp_path / "a.safetensors", base, 1e-2)
    merge(base, adapter, tmp_path / "merged.pth", dtype)
    merged = load_base(tmp_path / "merged.pth")
    assert {tensor.dtype for tensor in merged.values()} == {dtype or base_dtype}
    layer = load_with_adapter(base, adapter).model.blocks[1].ffn.value
    exact = layer.merged_weight(load_base(base)["blocks.1.ffn.value.weight"])
    assert torch.equal(merged["blocks.1.ffn.value.weight"], exact.to(dtype or base_dtype))
    assert torch.equal(merged["head.weight"], load_base(base)["head.weight"].to(dtype or base_dtype))


def test_the_part_of_a_small_update_that_bf16_keeps_is_reported(tmp_path):
    base = write_base(tmp_path / "base.pth", TINY, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "a.safetensors", base, 1e-4)
    rough = merge(base, adapter, tmp_path / "bf16.pth")
    exact = merge(base, adapter, tmp_path / "fp32.pth", torch.float32)
    assert exact.kept == pytest.approx(1, abs=1e-3)
    assert rough.kept < 0.6
    assert "Use --dtype fp32 to keep all of it" in str(rough)
    assert "--dtype" not in str(exact)
    # The same share, computed from the files.
    layer = load_with_adapter(base, adapter).model.blocks[0].att.key
    moved = load_base(tmp_path / "bf16.pth")["blocks.0.att.key.weight"].float() - layer.weight.float()
    delta = layer.delta_weight(layer.weight.float()).detach()
    share = float((moved * delta).sum() / delta.square().sum())
    assert share < 0.6


def test_wrong_inputs_are_one_line(tmp_path):
    base = write_base(tmp_path / "base.pth", TINY)
    adapter = write_adapter(tmp_path / "a.safetensors", base, 1e-2)
    other = write_base(tmp_path / "other.pth", TINY, seed=9)
    with pytest.raises(UserError, match="was trained on a base other than"):
        merge(other, adapter, tmp_path / "m.pth")
    with pytest.raises(UserError, match="would overwrite the base model"):
        merge(base, adapter, base)
    with pytest.raises(UserError, match="would overwrite the adapter"):
        merge(base, adapter, adapter)
    merge(base, adapter, tmp_path / "once.pth")
    with pytest.raises(UserError, match="was trained on a base other than"):
        merge(tmp_path / "once.pth", adapter, tmp_path / "twice.pth")
    with pytest.raises(UserError, match="cannot be written"):
        merge(base, adapter, base / "under_a_file.pth")
    adapter.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a.safetensors: not a readable .safetensors"):
        merge(base, adapter, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()
    result = program("tools/merge.py", "--base_model", base, "--adapter", adapter, "--output", tmp_path / "m.pth")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_method_flag_is_for_pth_adapters_only(tmp_path):
    base = write_base(tmp_path / "base.pth", TINY)
    adapter = write_adapter(tmp_path / "a.safetensors", base, 1e-2)
    torch.save(load_file(adapter), tmp_path / "a.pth")
    output = ["--output", str(tmp_path / "m.pth")]
    with pytest.raises(UserError, match=r"--peft: missing; a \.pth adapter does not contain .* Add --peft"):
        command.main(["--base_model", str(base), "--adapter", str(tmp_path / "a.pth"), *output])
    with pytest.raises(UserError, match=r"--peft: cannot be used with a \.safetensors adapter.*Omit --peft\."):
        command.main(["--base_model", str(base), "--adapter", str(adapter), *output, "--peft", "bone"])
    options = ["--peft", "bone", "--peft_config", '{"r":16}']
    command.main(["--base_model", str(base), "--adapter", str(tmp_path / "a.pth"), *output, *options])
    merge(base, adapter, tmp_path / "same.pth")
    ours, same = load_base(tmp_path / "m.pth"), load_base(tmp_path / "same.pth")
    assert all(torch.equal(ours[key], same[key]) for key in same)


def test_the_old_spelling_of_quantized_still_works(tmp_path):
    base = write_base(tmp_path / "base.pth", TINY)
    adapter = write_adapter(tmp_path / "a.safetensors", base, 1e-2)
    files = ["--base_model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "m.pth")]
    with pytest.raises(UserError, match=r"was not trained on a quantized base model\. Omit --onto\."):
        command.main([*files, "--onto", "quantised"])
    with pytest.raises(UserError, match="was not trained on a quantized base model"):
        merge(base, adapter, tmp_path / "m.pth", onto="quantised")


def test_an_adapter_with_an_unknown_tensor_is_refused(tmp_path):
    """An unknown tensor must not be dropped silently."""
    base = write_base(tmp_path / "base.pth", TINY)
    state = load_base(base)
    info = AdapterInfo(
        method="bone",
        options={"r": 16, "mode": "row"},
        targets=["blocks.0.att.key"],
        fingerprint=fingerprint(state),
    )
    tensors = {"blocks.0.att.key.bone": torch.ones(4, 16, 16), "blocks.0.att.kay.bone": torch.ones(4, 16, 16)}
    save_adapter(tmp_path / "a.safetensors", tensors, info)
    with pytest.raises(UserError, match=r"unknown: blocks.0.att.kay.bone"):
        merge(base, tmp_path / "a.safetensors", tmp_path / "m.pth")


def test_merging_is_deterministic(tmp_path):
    base = write_base(tmp_path / "base.pth", TINY)
    adapter = write_adapter(tmp_path / "a.safetensors", base, 1e-2)
    for name in ("one", "two"):
        merge(base, adapter, tmp_path / f"{name}.pth")
    one, two = load_base(tmp_path / "one.pth"), load_base(tmp_path / "two.pth")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert relative_error(one["blocks.0.att.key.weight"], load_base(base)["blocks.0.att.key.weight"]) > 1e-3
    save_base(one, tmp_path / "copy.pth")  # a merged file is an ordinary base model


def test_a_base_of_mixed_dtypes_keeps_its_precision(tmp_path):
    """A bf16 embedding must not reduce the precision of fp32 matrices."""
    state = load_base(write_base(tmp_path / "fp32.pth", TINY))
    save_base(state | {"emb.weight": state["emb.weight"].bfloat16()}, tmp_path / "base.pth")
    adapter = write_adapter(tmp_path / "a.safetensors", tmp_path / "base.pth", 1e-3)
    report = merge(tmp_path / "base.pth", adapter, tmp_path / "m.pth")
    merged = load_base(tmp_path / "m.pth")
    weight = state["blocks.0.att.key.weight"]
    assert relative_error(merged["blocks.0.att.key.weight"], weight) < 10 * report.relative_size
    assert report.kept == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "5"},
        {"method": '"nonsense"'},
        {"options": "null"},
        {"options": '{"zz": 1}'},
        {"targets": "[1]"},
        {"targets": '["blocks.9.att.key"]'},
        {"fingerprint": "{}"},
        {"tokenizer": "3"},
        {"targets": "not json"},
        {"format_version": "1"},
        {"method": None},
    ],
)
def test_damaged_metadata_is_an_error_that_names_the_file(change, tmp_path):
    base = write_base(tmp_path / "base.pth", TINY)
    path = write_adapter(tmp_path / "a.safetensors", base, 1e-2)
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata() | change
    tensors = load_file(path)
    save_file(tensors, path, metadata={key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(UserError, match=r"a\.safetensors: "):
        merge(base, path, tmp_path / "m.pth")


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    base = write_base(tmp_path / "base.pth", TINY)
    with pytest.raises(UserError, match="not finite"):
        merge(base, write_adapter(tmp_path / "a.safetensors", base, float("nan")), tmp_path / "m.pth")
