"""Whole runs in this process: what they leave behind, and that they train what they should, exactly."""

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
from rwkv_peft.config import flags as cli
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import UserError
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.run import run
from tests.helpers import relative_error, write_base
from tests.training.small_runs import SHAPE, train, write_inputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path)


BONE = ["--peft", "bone", "--bone_config", '{"r":16}']


def test_a_bone_run_leaves_an_adapter_metrics_and_config(inputs, tmp_path, capsys):
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


def test_padding_does_not_train(inputs, tmp_path):
    """Twice the padding changes neither losses nor token counts."""
    short = train(tmp_path / "a", inputs, *BONE)
    long = train(tmp_path / "b", inputs, *BONE, "--ctx_len", "96")
    for a, b in zip(short, long, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_accumulation_equals_a_larger_batch(inputs, tmp_path):
    """Rows without padding, so that every batch has as many trained tokens."""
    one = train(tmp_path / "a", inputs, *BONE, "--dataload", "get", "--micro_bsz", "8", "--epoch_steps", "4")
    more = ["--dataload", "get", "--micro_bsz", "4", "--epoch_steps", "8", "--accumulate_grad_batches", "2"]
    two = train(tmp_path / "b", inputs, *BONE, *more)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_runs_repeat_and_checkpointing_changes_nothing(inputs, tmp_path):
    losses = [
        [row["loss"] for row in train(tmp_path / name, inputs, *BONE, *more)]
        for name, more in (("a", []), ("b", []), ("c", ["--grad_cp", "1"]))
    ]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("deepspeed_stage_1", "bf16"), ("deepspeed_stage_2", "fp32"), ("deepspeed_stage_3", "bf16")],
)
def test_deepspeed_equals_plain_training(strategy, precision, inputs, tmp_path):
    """Losses and gradient norms, under accumulation, where the loss must be divided once only; adapters stay fp32.

    In bf16 a difference in an adapter's last bit rounds some activations the other way: 8e-5 of a loss after two steps.
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
    again = train(tmp_path / "on", inputs, "--precision", precision, "--train_parts", "time", "ln", "--peft", "bone",
                  "--bone_config", json.dumps({"r": 16, "load": f"{tmp_path}/run/rwkv-0.safetensors"}))  # fmt: skip
    assert again[0]["loss"] < rows[0]["loss"] * 0.9, "a warm start goes on from where the adapter was"


def test_full_training_saves_a_model(inputs, tmp_path):
    train(tmp_path / "run", inputs)
    before, after = load_base(inputs[1]), load_base(tmp_path / "run" / "rwkv-0.pth")
    assert list(before) == list(after)
    assert all(
        not torch.equal(before[key], after[key]) for key in ("emb.weight", "head.weight", "blocks.1.ffn.value.weight")
    )


def test_an_adapter_on_a_model_from_scratch_keeps_its_base(inputs, tmp_path):
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


def test_wrong_adapters_are_refused(inputs, tmp_path):
    train(tmp_path / "run", inputs, *BONE)
    adapter = f"{tmp_path}/run/rwkv-0.safetensors"
    other = write_base(tmp_path / "other.pth", SHAPE, seed=7)

    def start(base, options):
        train(
            tmp_path / "next",
            ["--load_model", str(base), *inputs[2:]],
            "--peft",
            "bone",
            "--bone_config",
            json.dumps(options),
        )

    with pytest.raises(UserError, match=r"rwkv-0.safetensors: was trained on another base than .*other.pth"):
        start(other, {"r": 16, "load": adapter})
    with pytest.raises(UserError, match="has r 16, this run 32"):
        start(inputs[1], {"r": 32, "load": adapter})
    with pytest.raises(UserError, match="has mode row, this run left"):
        start(inputs[1], {"r": 16, "mode": "left", "load": adapter})
    with pytest.raises(UserError, match="another base"):
        load_with_adapter(other, adapter)


def test_data_of_another_tokenizer_is_refused(inputs, tmp_path):
    train(tmp_path / "run", inputs, *BONE)
    with BinidxWriter(tmp_path / "world", load_tokenizer("world")) as writer:
        writer.add_document([5, 6, 7, 0])
    options = json.dumps({"r": 16, "load": f"{tmp_path}/run/rwkv-0.safetensors"})
    with pytest.raises(UserError, match=r"another tokenizer than the adapter's; found .*world.*expected bytes"):
        train(
            tmp_path / "next",
            [*inputs[:2], "--data_file", f"{tmp_path}/world"],
            "--peft",
            "bone",
            "--bone_config",
            options,
        )


def test_token_beyond_the_vocabulary_is_refused_before_training(inputs, tmp_path):
    with BinidxWriter(tmp_path / "big", load_tokenizer("world")) as writer:
        writer.add_document([5, 60000, 7, 0])
    with pytest.raises(
        UserError, match=r"big.bin: a token id beyond the vocabulary; found 60000 at token 1 of document 0"
    ):
        train(tmp_path / "run", [*inputs[:2], "--data_file", f"{tmp_path}/big"], *BONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["key", "*", "weight"])
def test_a_part_under_an_adapter_cannot_train_beside_it(part, inputs, tmp_path):
    with pytest.raises(UserError, match=r"--train_parts: names blocks.0.*, which carries an adapter"):
        train(tmp_path / "run", inputs, *BONE, "--train_parts", part)


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    with pytest.raises(UserError, match=r"training step 6: 5 steps in a row .*not finite"):
        train(tmp_path / "run", inputs, "--lr_init", "1e30", "--lr_final", "1e30", "--grad_clip", "0")
    assert not list((tmp_path / "run").glob("rwkv-*"))


def test_proj_dir_that_cannot_be(inputs, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--proj_dir: .*a file, expected a folder"):
            train(folder, inputs, *BONE)


def test_going_on_keeps_the_metrics_of_before(inputs, tmp_path, capsys):
    train(tmp_path / "run", inputs, *BONE)
    assert len(train(tmp_path / "run", inputs, *BONE, "--epoch_begin", "1")) == 12
    assert "holds an earlier run" not in capsys.readouterr().out
    assert len(train(tmp_path / "run", inputs, *BONE)) == 6
    assert "holds an earlier run" in capsys.readouterr().out


def test_every_wkv_backend_trains_the_same(inputs, tmp_path):
    losses = [
        [row["loss"] for row in train(tmp_path / name, inputs, *BONE, "--wkv", name)]
        for name in ("native", "torch", "reference")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


ZERO_3 = ["--strategy", "deepspeed_stage_3", "--devices", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("more", [[], ZERO_3], ids=["alone", "zero_3"])
def test_a_stopped_run_saves_and_says_so(more, signal_, code, inputs, tmp_path):
    """Also where two processes each hold a share of every parameter."""
    returncode, output = stop_a_run(signal_, tmp_path / "run", inputs, *more)
    assert returncode == code, output
    assert "stopped by a signal after step" in output
    assert "stopped by a signal, 20" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    tensors, info = read_adapter(tmp_path / "run" / "rwkv-stopped.safetensors")
    assert set(tensors) == {f"{name}.bone" for name in info.targets}
    assert all(tensor.shape[1:] == (16, 16) and tensor.abs().max() > 0 for tensor in tensors.values())


def test_after_a_run_the_signals_are_as_before(inputs, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(tmp_path / "run", inputs, *BONE)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def stop_a_run(signal_: signal.Signals, folder: Path, inputs: list[str], *more: str) -> tuple[int, str]:
    """Exit code and output of a run that gets a signal once it trains."""
    flags = "--ctx_len 48 --epoch_steps 100000 --lr_init 1e-3".split()
    command = [sys.executable, "train.py", *inputs, *flags, *BONE, "--proj_dir", str(folder), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal_)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_warm_start_from_an_adapter_of_rwkv_peft(inputs, tmp_path):
    """Its `.pth` holds bare `.bone` tensors."""
    train(tmp_path / "run", inputs, *BONE)
    tensors, _ = read_adapter(tmp_path / "run" / "rwkv-0.safetensors")
    torch.save(tensors, tmp_path / "theirs.pth")
    ours = train(
        tmp_path / "a",
        inputs,
        "--peft",
        "bone",
        "--bone_config",
        json.dumps({"r": 16, "load": f"{tmp_path}/run/rwkv-0.safetensors"}),
    )
    theirs = train(
        tmp_path / "b",
        inputs,
        "--peft",
        "bone",
        "--bone_config",
        json.dumps({"bone_r": 16, "bone_load": f"{tmp_path}/theirs.pth"}),
    )
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]


def test_dry_run_of_the_public_shape_allocates_nothing(tmp_path, capsys):
    flags = "--n_layer 24 --n_embd 2048 --vocab_size 65536 --peft bone --dry_run".split()
    run(cli.resolve(cli.parse_args([*flags, "--bone_config", '{"r":64}', "--proj_dir", str(tmp_path / "none")])))
    out = capsys.readouterr().out
    assert "trainable 33,030,144 of 1,632,903,168 parameters (33.0M" in out
    assert not (tmp_path / "none").exists()


def test_a_drawn_seed_is_written_down(inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    train(tmp_path / "run", inputs, *BONE, "--random_seed", "-1")
    drawn = cli.parse_args(["--config", f"{tmp_path}/run/config.yaml"])["random_seed"]
    assert drawn >= 0


def test_bf16_stays_close_to_fp32(inputs, tmp_path):
    exact = train(tmp_path / "a", inputs, *BONE)
    rough = train(tmp_path / "b", inputs, *BONE, "--precision", "bf16")
    a, b = (torch.tensor([row["loss"] for row in rows]) for rows in (exact, rough))
    assert 0 < relative_error(b, a) < 2e-2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accelerator", "gpu"], "--accelerator: bad value; found no CUDA device"),
        (["--precision", "fp16", "--accelerator", "cpu"], "--precision: bad value; found fp16 on a CPU"),
        (["--devices", "0"], "--devices: bad value; found 0"),
        (["--wandb", "project"], "--wandb: the package wandb is not installed"),
    ],
)
def test_what_this_machine_cannot_do(flags, message, inputs, tmp_path):
    if "gpu" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", inputs, *BONE, *flags)


@pytest.mark.slow
def test_two_processes_equal_one(inputs, tmp_path):
    """Half the batch on each of two devices gives the losses and gradient norms of one device."""
    pair = train_in_a_process(tmp_path / "two", inputs, "--micro_bsz", "2", "--devices", "2", "--strategy", "ddp")
    one = train_in_a_process(tmp_path / "one", inputs, "--micro_bsz", "4")
    assert len(pair) == len(one) == 6
    for a, b in zip(pair, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]


def train_in_a_process(folder: Path, inputs: list[str], *more: str) -> list[dict]:
    """`train`, as a user runs it; rows without padding. A process group stays with its process to the end."""
    flags = "--ctx_len 48 --epoch_steps 6 --lr_init 1e-3 --lr_final 1e-3".split()
    command = [sys.executable, "train.py", *inputs, *flags, *BONE, "--proj_dir", str(folder), *more]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
