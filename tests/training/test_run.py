"""Whole runs: the files they write, and which parameters they train."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_peft.adapted_model import load_with_adapter
from rwkv_peft.base_model import load_base
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import UserError
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.run import RunResult
from tests.helpers import relative_error, write_base
from tests.training.small_runs import COMMON, SHAPE, config_of, steps, train, train_flags, validations, write_inputs

ROOT = Path(__file__).resolve().parents[2]


BONE = ["--peft", "bone", "--bone_config", '{"r":16}']


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def bone_run(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with Bone, for tests that only read it."""
    folder = tmp_path_factory.mktemp("bone") / "run"
    train(folder, inputs, *BONE)
    return folder


def losses_of(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def warm_start(adapter: Path, **options: object) -> list[str]:
    """Return the flags of a run that starts from an adapter."""
    return ["--peft", "bone", "--bone_config", json.dumps({"r": 16, "load": str(adapter), **options})]


def test_a_bone_run_writes_adapters_metrics_and_config(inputs, tmp_path, capsys):
    rows = train(tmp_path / "run", inputs, *BONE, "--epoch_count", "3", "--epoch_save", "2", "--epoch_begin", "5")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "rwkv-6.safetensors",
        "rwkv-7.safetensors",
    ]
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert {"step", "loss", "lr", "tokens", "tokens_per_s", "time"} <= rows[0].keys()
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    tensors, info = read_adapter(tmp_path / "run" / "rwkv-7.safetensors")
    assert set(tensors) == {f"{name}.bone" for name in info.targets}
    assert len(tensors) == 16
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert info.tokenizer["name"] == "bytes"
    assert "trainable" in capsys.readouterr().out


def test_the_result_of_a_run_and_its_printed_lines(inputs, tmp_path, capsys):
    """Every line is printed once, and none by Lightning."""
    out = tmp_path / "run"
    flags = [*inputs, *COMMON, *BONE, "--val_data_file", inputs[3], "--save_every", "2", "--proj_dir", str(out)]
    result = train_flags(flags)
    printed = capsys.readouterr()
    assert result == RunResult(
        proj_dir=out,
        weights=out / "rwkv-0.safetensors",
        best_weights=out / "rwkv-best.safetensors",
        steps=6,
        loss=steps(out)[-1]["loss"],
        best_val_loss=min(row["val_loss"] for row in validations(out)),
    )
    assert result.weights.exists()
    assert result.best_weights.exists()
    lines = [line for line in printed.out.splitlines() + printed.err.splitlines() if line]
    assert len(lines) == len(set(lines)), lines
    ours = "model trainable memory data steps val note: output device train step saved best".split()
    assert {line.split()[0] for line in lines if line[0] != " "} <= set(ours), lines
    finished = train_flags([*flags, "--resume", "auto"])
    assert (finished.weights, finished.steps, finished.loss) == (result.weights, 6, None)
    assert "nothing left to train: the only epoch is done" in capsys.readouterr().out


def test_padding_is_not_in_the_loss(bone_run, inputs, tmp_path):
    """Longer rows with more padding have the same losses and token counts."""
    long = train(tmp_path / "run", inputs, *BONE, "--ctx_len", "96")
    for a, b in zip(steps(bone_run), long, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_accumulation_equals_a_larger_batch(inputs, tmp_path):
    """On rows without padding. test_step.py has micro-batches with different numbers of tokens."""
    one = train(tmp_path / "a", inputs, *BONE, "--dataload", "get", "--micro_bsz", "8", "--epoch_steps", "4")
    more = ["--dataload", "get", "--micro_bsz", "4", "--epoch_steps", "8", "--accumulate_grad_batches", "2"]
    two = train(tmp_path / "b", inputs, *BONE, *more)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_runs_repeat_and_checkpointing_changes_nothing(bone_run, inputs, tmp_path):
    losses = losses_of(steps(bone_run))
    assert losses_of(train(tmp_path / "a", inputs, *BONE)) == losses
    assert losses_of(train(tmp_path / "b", inputs, *BONE, "--grad_cp", "1")) == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("deepspeed_stage_1", "bf16"), ("deepspeed_stage_2", "fp32"), ("deepspeed_stage_3", "bf16")],
)
def test_deepspeed_equals_plain_training(strategy, precision, inputs, tmp_path):
    """Compare losses and gradient norms under accumulation; adapters stay fp32.

    In bf16, a difference in the last bit of an adapter can round activations in the other direction. Measured: 8e-5 of
    the loss after two steps.
    """
    exact = precision == "fp32"
    more = ["--accumulate_grad_batches", "2", "--precision", precision]
    plain = train_in_a_process(tmp_path / "a", inputs, *more)
    deep = train_in_a_process(tmp_path / "b", inputs, *more, "--strategy", strategy)
    assert len(plain) == len(deep) == 3
    for a, b in zip(plain, deep, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if exact else 5e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4 if exact else 1e-3)
    tensors, _ = read_adapter(tmp_path / "b" / "rwkv-0.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_adapter_file_reproduces_the_trained_model(precision, inputs, tmp_path):
    rows = train(tmp_path / "run", inputs, *BONE, "--precision", precision, "--train_parts", "time", "ln")
    loaded = load_with_adapter(inputs[1], tmp_path / "run" / "rwkv-0.safetensors")
    parts = {name for name in loaded.trained if not name.endswith(".bone")}
    assert parts == {name for name in loaded.base if ".time_" in name or name.split(".")[-2].startswith("ln")}
    assert all(tensor.dtype == torch.float32 for tensor in loaded.trained.values())
    start = [*warm_start(tmp_path / "run" / "rwkv-0.safetensors"), "--train_parts", "time", "ln"]
    again = train(tmp_path / "again", inputs, *start, "--precision", precision, "--epoch_steps", "1")
    assert again[0]["loss"] < rows[0]["loss"] * 0.9, "a warm start continues from the saved adapter"


def test_full_training_saves_a_model(inputs, tmp_path):
    train(tmp_path / "run", inputs)
    before, after = load_base(inputs[1]), load_base(tmp_path / "run" / "rwkv-0.pth")
    assert list(before) == list(after)
    assert all(
        not torch.equal(before[key], after[key]) for key in ("emb.weight", "head.weight", "blocks.1.ffn.value.weight")
    )


def test_a_run_from_scratch_with_an_adapter_saves_its_base(inputs, tmp_path):
    shape = "--n_layer 1 --n_embd 64 --head_size 32".split()
    train(tmp_path / "run", inputs[2:], *shape, *BONE)
    loaded = load_with_adapter(tmp_path / "run" / "rwkv-init.pth", tmp_path / "run" / "rwkv-0.safetensors")
    assert loaded.model.config.vocab_size == 257, "the vocabulary is the data's"


def test_lora_trains_through_the_same_registry(inputs, tmp_path):
    rows = train(tmp_path / "run", inputs, "--peft", "lora", "--lora_config", '{"lora_r":8,"lora_alpha":16}')
    tensors, info = read_adapter(tmp_path / "run" / "rwkv-0.safetensors")
    assert (info.options["r"], info.options["alpha"], info.options["dropout"]) == (8, 16.0, 0.0)
    assert {name.rsplit(".", 1)[1] for name in tensors} == {"lora_A", "lora_B"}
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_adapters_that_do_not_match_are_refused(bone_run, inputs, tmp_path):
    adapter = bone_run / "rwkv-0.safetensors"
    other = write_base(tmp_path / "other.pth", SHAPE, seed=7)

    def start(base, **options):
        train(tmp_path / "next", ["--load_model", str(base), *inputs[2:]], *warm_start(adapter, **options))

    with pytest.raises(UserError, match=r"rwkv-0.safetensors: was trained on a base other than .*other.pth"):
        start(other)
    with pytest.raises(UserError, match="the adapter was trained with r=16, but this run uses r=32"):
        start(inputs[1], r=32)
    with pytest.raises(UserError, match="the adapter was trained with mode=row, but this run uses mode=left"):
        start(inputs[1], mode="left")
    with pytest.raises(UserError, match="was trained on a base other than"):
        load_with_adapter(other, adapter)


def test_data_of_another_tokenizer_is_refused(bone_run, inputs, tmp_path):
    with BinidxWriter(tmp_path / "world", load_tokenizer("world")) as writer:
        writer.add_document([5, 6, 7, 0])
    data = [*inputs[:2], "--data_file", f"{tmp_path}/world"]
    with pytest.raises(UserError, match=r"a different tokenizer than the adapter's; found .*world.*expected bytes"):
        train(tmp_path / "next", data, *warm_start(bone_run / "rwkv-0.safetensors"))


def test_token_beyond_the_vocabulary_is_refused_before_training(inputs, tmp_path):
    with BinidxWriter(tmp_path / "big", load_tokenizer("world")) as writer:
        writer.add_document([5, 60000, 7, 0])
    with pytest.raises(UserError, match=r"big.bin: a token id is outside the vocabulary; found 60000 at token 1 of"):
        train(tmp_path / "run", [*inputs[:2], "--data_file", f"{tmp_path}/big"], *BONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["key", "*"])
def test_train_parts_cannot_name_layers_with_an_adapter(part, inputs, tmp_path):
    with pytest.raises(UserError, match=r"--train_parts: matches blocks.0.*, which has an adapter"):
        train(tmp_path / "run", inputs, *BONE, "--train_parts", part)


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    with pytest.raises(UserError, match=r"training step 6: 5 steps in a row .*not finite"):
        train(tmp_path / "run", inputs, "--lr_init", "1e30", "--lr_final", "1e30", "--grad_clip", "0")
    assert not list((tmp_path / "run").glob("rwkv-*"))


def test_a_proj_dir_that_cannot_be_created(inputs, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--proj_dir: .*a file, expected a folder"):
            train(folder, inputs, *BONE)


def test_epoch_begin_keeps_earlier_metrics(inputs, tmp_path, capsys):
    short = [*BONE, "--epoch_steps", "2"]
    train(tmp_path / "run", inputs, *short)
    assert len(train(tmp_path / "run", inputs, *short, "--epoch_begin", "1")) == 4
    assert "contains an earlier run" not in capsys.readouterr().out
    assert len(train(tmp_path / "run", inputs, *short)) == 2
    assert "contains an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_wkv_backend_trains_the_same(backend, bone_run, inputs, tmp_path):
    rows = train(tmp_path / "run", inputs, *BONE, "--wkv", backend, "--epoch_steps", "2")
    assert losses_of(rows) == pytest.approx(losses_of(steps(bone_run))[:2], rel=1e-5)


ZERO_3 = ["--strategy", "deepspeed_stage_3", "--devices", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("more", [[], ZERO_3], ids=["alone", "zero_3"])
def test_a_stopped_run_saves_and_reports_it(more, signal_, code, inputs, tmp_path):
    """Also under ZeRO-3, where each of two processes has a shard of every parameter."""
    returncode, output = stop_a_run(signal_, tmp_path / "run", inputs, *more)
    assert returncode == code, output
    assert "stopped by a signal after step" in output
    assert "stopped by a signal, 20" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    tensors, info = read_adapter(tmp_path / "run" / "rwkv-stopped.safetensors")
    assert set(tensors) == {f"{name}.bone" for name in info.targets}
    assert all(tensor.shape[1:] == (16, 16) and tensor.abs().max() > 0 for tensor in tensors.values())


def test_signal_handlers_are_restored_after_a_run(inputs, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(tmp_path / "run", inputs, *BONE, "--epoch_steps", "1")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def stop_a_run(signal_: signal.Signals, folder: Path, inputs: list[str], *more: str) -> tuple[int, str]:
    """Send a signal to a run after its first step; return its exit code and output."""
    flags = "--ctx_len 48 --epoch_steps 100000 --lr_init 1e-3".split()
    command = [sys.executable, "train.py", *inputs, *flags, *BONE, "--proj_dir", str(folder), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal_)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_warm_start_from_an_adapter_of_rwkv_peft(bone_run, inputs, tmp_path):
    """RWKV-PEFT's `.pth` has only the `.bone` tensors."""
    ours = bone_run / "rwkv-0.safetensors"
    torch.save(read_adapter(ours)[0], tmp_path / "theirs.pth")
    theirs = ["--peft", "bone", "--bone_config", json.dumps({"bone_r": 16, "bone_load": f"{tmp_path}/theirs.pth"})]
    losses = [
        losses_of(train(tmp_path / name, inputs, *flags, "--epoch_steps", "2"))
        for name, flags in (("ours", warm_start(ours)), ("theirs", theirs))
    ]
    assert losses[0] == losses[1]


def test_dry_run_of_a_public_shape_creates_no_files(tmp_path, capsys, monkeypatch):
    # With a known amount of free memory, cheaper settings would be estimated, too.
    monkeypatch.setattr("rwkv_peft.training.metrics.startup_summary.free_bytes", lambda device: None)
    flags = "--n_layer 24 --n_embd 2048 --vocab_size 65536 --peft bone --dry_run".split()
    result = train_flags([*flags, "--bone_config", '{"r":64}', "--proj_dir", str(tmp_path / "none")])
    assert (result.weights, result.steps, result.loss) == (None, 0, None)
    out = capsys.readouterr().out
    assert "trainable 33,030,144 of 1,632,903,168 parameters (33.0M" in out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resume auot", "--resume: no such file or folder; found auot"),
        ("--sample_prompts none.txt", "--sample_prompts: none.txt cannot be read"),
        ("--wandb project", "--wandb: the package wandb is not installed"),
    ],
)
def test_a_dry_run_checks_files_and_packages(flags, message):
    with pytest.raises(UserError, match=message):
        train_flags(["--n_layer", "1", "--n_embd", "64", "--dry_run", *flags.split()])


def test_a_drawn_seed_is_saved_in_config_yaml(inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    train(tmp_path / "run", inputs, *BONE, "--random_seed", "-1", "--epoch_steps", "1")
    assert config_of(["--config", f"{tmp_path}/run/config.yaml"]).data.random_seed >= 0


def test_bf16_stays_close_to_fp32(bone_run, inputs, tmp_path):
    rough = train(tmp_path / "run", inputs, *BONE, "--precision", "bf16")
    a, b = (torch.tensor(losses_of(rows)) for rows in (steps(bone_run), rough))
    assert 0 < relative_error(b, a) < 2e-2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accelerator", "gpu"], "--accelerator: no CUDA device was found"),
        (["--precision", "fp16", "--accelerator", "cpu"], "--precision: invalid value; found fp16 on a CPU"),
        (["--devices", "0"], "--devices: invalid value; found 0"),
        (["--wandb", "project"], "--wandb: the package wandb is not installed"),
    ],
)
def test_flags_that_this_machine_does_not_support(flags, message, inputs, tmp_path):
    if "gpu" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", inputs, *BONE, *flags)


@pytest.mark.slow
def test_two_processes_equal_one(inputs, tmp_path):
    """Two devices with half the batch each have the same losses and gradient norms as one device."""
    pair = train_in_a_process(tmp_path / "two", inputs, "--micro_bsz", "2", "--devices", "2", "--strategy", "ddp")
    one = train_in_a_process(tmp_path / "one", inputs, "--micro_bsz", "4")
    assert len(pair) == len(one) == 6
    for a, b in zip(pair, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    printed = (tmp_path / "two.log").read_text()
    for line in ("model   ", "device  ", "saved ", "train 100%  step 6/6"):
        assert printed.count(f"\n{line}") + printed.startswith(line) == 1, f"{line!r} is printed once: {printed}"


def train_in_a_process(folder: Path, inputs: list[str], *more: str) -> list[dict]:
    """Like `train`, but on rows without padding and in another process, because a process group cannot be left."""
    flags = "--ctx_len 48 --epoch_steps 6 --lr_init 1e-3 --lr_final 1e-3".split()
    command = [sys.executable, "train.py", *inputs, *flags, *BONE, "--proj_dir", str(folder), *more]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout
    folder.with_suffix(".log").write_text(result.stdout)
    return steps(folder)
