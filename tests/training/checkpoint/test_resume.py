"""Runs that resume from a checkpoint, in this process. test_kills.py resumes runs that were killed."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_peft.base_model import load_base
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import CheckpointError, UserError
from rwkv_peft.files import lock_run_folder
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.checkpoint import file as checkpoints
from rwkv_peft.training.checkpoint.file import checkpoint_path, list_checkpoints, read_checkpoint
from rwkv_peft.training.metrics.events import StepMetrics
from rwkv_peft.training.metrics.metrics_file import MetricsFile
from tests.helpers import with_shape, write_base
from tests.peft.cases import CASES
from tests.training.small_runs import SHAPE, metrics, train, write_inputs

BONE = ["--peft", "bone", "--bone_config", '{"r":16}', "--train_parts", "ln"]
SHORT = ["--epoch_steps", "3", "--epoch_count", "2", "--lr_final", "1e-4"]
"""Six steps."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished Bone run with all of its checkpoints. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, inputs, *BONE, *SHORT, "--save_every", "1", "--keep_last", "9")
    return folder


def saved(folder: Path, epoch: int | str = 1) -> dict[str, Tensor]:
    (path,) = folder.glob(f"rwkv-{epoch}.*")
    return load_base(path) if path.suffix == ".pth" else read_adapter(path)[0]


def assert_same(folder: Path, reference: Path) -> None:
    """Check that the metrics (except times) and the saved weights are equal bit for bit."""
    for a, b in zip(metrics(folder), metrics(reference), strict=True):
        assert all(a[name] == b[name] for name in ("step", "loss", "lr", "tokens", "grad_norm")), (a, b)
    found, expected = saved(folder), saved(reference)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def at(folder: Path, step: int) -> Path:
    return checkpoint_path(folder / "checkpoints", step)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_resumes_from_any_step(step, inputs, finished, tmp_path):
    """In the middle of an epoch and between two epochs, into another folder."""
    train(tmp_path / "run", inputs, *BONE, *SHORT, "--resume", str(at(finished, step)))
    assert_same(tmp_path / "run", finished)


CASES_OF_METHODS = [pytest.param(method, options, [], marks=pytest.mark.slow) for method, options in CASES]
OTHER_CASES = [
    ("none", {}, []),
    ("prompt", {"tokens": 5}, []),
    ("lisa", {"layers": 1, "interval": 2}, []),
    ("none", {}, ["--train_type", "state"]),
    ("none", {}, ["--train_parts", "ln", "--dataload", "walk"]),
    ("bone", {"r": 16, "mode": "col", "rounding": "stochastic"}, ["--precision", "bf16"]),
    ("bone", {"r": 16}, ["--adapter_dtype", "bf16"]),
    ("lora", {"r": 4, "dropout": 0.1}, ["--train_type", "infctx", "--chunk_ctx", "20"]),
    ("lora", {"r": 4}, ["--optim", "adam_8bit"]),
    ("pissa", {"r": 4}, ["--quant", "nf4"]),
    ("lora_ga", {"r": 4}, ["--train_parts", "time", "ln"]),
]


@pytest.mark.parametrize(("method", "options", "more"), [*CASES_OF_METHODS, *OTHER_CASES])
def test_every_method_resumes_exactly(method, options, more, inputs, tmp_path):
    """With accumulation, so that an epoch's last step has a single batch; LISA in the middle of an interval."""
    flags = ["--peft", method, "--peft_config", json.dumps(options), *more, *SHORT, "--accumulate_grad_batches", "2"]
    train(tmp_path / "a", inputs, *flags, "--save_every", "1", "--keep_last", "9")
    train(tmp_path / "b", inputs, *flags, "--resume", str(at(tmp_path / "a", 3)))
    assert_same(tmp_path / "b", tmp_path / "a")
    assert not (tmp_path / "b" / "rwkv-0.safetensors").exists(), "the first epoch must not be trained again"


def test_saving_changes_nothing(inputs, finished, tmp_path):
    train(tmp_path / "run", inputs, *BONE, *SHORT)
    assert_same(tmp_path / "run", finished)
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [6, 3], "at the ends of the epochs"


def test_a_checkpoint_has_only_the_trainable_parameters_and_their_state(inputs, finished):
    found = read_checkpoint(at(finished, 3))
    (trained, _) = read_adapter(finished / "rwkv-0.safetensors")
    kinds = ("model", "exp_avg", "exp_avg_sq")
    assert set(found.tensors) == {f"{kind}/{name}" for kind in kinds for name in trained}
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert all(torch.equal(found.tensors[f"model/{name}"], tensor) for name, tensor in trained.items())
    assert set(found.manifest["scalars"]["step"].values()) == {3.0}
    elements = sum(tensor.numel() for tensor in trained.values())
    assert at(finished, 3).stat().st_size < 12 * elements + 60_000


# ------------------------------------------------------------------------------------------ stopping


@pytest.fixture
def stop_at(monkeypatch):
    """A function that makes SIGTERM arrive during a step."""

    def arrange(step: int) -> None:
        plain = MetricsFile.__call__

        def record(self, event):
            plain(self, event)
            if event.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(MetricsFile, "__call__", record)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("step", [2, 3])
def test_a_stopped_run_resumes(step, inputs, finished, tmp_path, stop_at, monkeypatch, capsys):
    """In the middle of an epoch, and at its end, when the epoch's adapter is saved first."""
    stop_at(step)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", inputs, *BONE, *SHORT)
    assert stopped.value.code == 143
    out = capsys.readouterr().out
    assert f"stopped by a signal after step {step} of 6" in out
    assert f"resume with: rwkv-peft train --config {tmp_path}/run/config.yaml --resume auto" in out
    assert (tmp_path / "run" / "rwkv-0.safetensors").exists() == (step == 3)
    assert set(saved(tmp_path / "run", "stopped")) == set(saved(finished))
    monkeypatch.undo()
    train(tmp_path / "run", ["--config", f"{tmp_path}/run/config.yaml", "--resume", "auto"], *SHORT)
    assert_same(tmp_path / "run", finished)


def test_a_stop_that_cannot_be_saved_is_an_error(inputs, tmp_path, stop_at, monkeypatch):
    fail_from(monkeypatch, 2, 2)
    stop_at(2)
    with pytest.raises(CheckpointError, match=r"step-000002.* cannot be written"):
        train(tmp_path / "run", inputs, *BONE, *SHORT)
    assert saved(tmp_path / "run", "stopped")


def test_a_signal_in_the_last_step_changes_nothing(inputs, finished, tmp_path, stop_at):
    stop_at(6)
    train(tmp_path / "run", inputs, *BONE, *SHORT)
    assert_same(tmp_path / "run", finished)


def test_a_base_created_by_the_run_is_restored(inputs, tmp_path):
    """Training from scratch, with trainable parts of the base."""
    shape = "--n_layer 1 --n_embd 64 --head_size 32".split()
    flags = [*inputs[2:], *shape, *BONE, *SHORT]
    train(tmp_path / "a", flags, "--save_every", "1", "--keep_last", "9")
    train(tmp_path / "b", flags, "--resume", str(at(tmp_path / "a", 4)))
    assert_same(tmp_path / "b", tmp_path / "a")
    first, second = (load_base(tmp_path / name / "rwkv-init.pth") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------- which checkpoint, and which folder


def copy_checkpoints(finished: Path, folder: Path, *steps: int) -> Path:
    """Create a run's folder with some of the finished run's checkpoints, all of its metrics, and a truncated line."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        at(folder, step).write_bytes(at(finished, step).read_bytes())
    (folder / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes() + b'{"step": 7, "lo')
    return folder


def test_auto_without_a_checkpoint_starts_a_new_run(inputs, finished, tmp_path, capsys):
    train(tmp_path / "run", inputs, *BONE, *SHORT, "--resume", "auto")
    assert "no checkpoint in" in capsys.readouterr().out
    assert_same(tmp_path / "run", finished)


def damaged(content: bytes) -> bytes:
    return content[:3000] + bytes([content[3000] ^ 8]) + content[3001:]


@pytest.mark.parametrize("damage", [damaged, lambda content: content[:-100], lambda content: b""])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(damage, inputs, finished, tmp_path, capsys):
    folder = copy_checkpoints(finished, tmp_path / "run", 2, 4)
    at(folder, 4).write_bytes(damage(at(folder, 4).read_bytes()))
    train(folder, inputs, *BONE, *SHORT, "--resume", "auto", "--keep_last", "1")
    out = capsys.readouterr().out
    assert re.search(r"resume  .*step-000004.safetensors: damaged or truncated", out)
    assert re.search(r"resume  .*step-000002.safetensors: after step 2 of 6", out)
    assert_same(folder, finished)
    assert list(list_checkpoints(folder / "checkpoints")) == [6]


def test_without_a_valid_checkpoint_nothing_is_changed(inputs, finished, tmp_path):
    folder = copy_checkpoints(finished, tmp_path / "run", 2, 4)
    for step in (2, 4):
        at(folder, step).write_bytes(b"nothing")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read"):
        train(folder, inputs, *BONE, *SHORT, "--resume", "auto")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resume_takes_the_folder_of_a_run(inputs, finished, tmp_path):
    folder = copy_checkpoints(finished, tmp_path / "run", 2, 4)
    train(tmp_path / "next", inputs, *BONE, *SHORT, "--resume", str(folder))
    assert_same(tmp_path / "next", finished)
    with pytest.raises(UserError, match="--resume: has no checkpoints"):
        train(tmp_path / "next", inputs, *BONE, *SHORT, "--resume", str(tmp_path))
    with pytest.raises(UserError, match="--resume: no such file or folder"):
        train(tmp_path / "next", inputs, *BONE, *SHORT, "--resume", str(tmp_path / "none"))


def test_later_checkpoints_stay_until_a_new_one_is_saved(inputs, finished, tmp_path):
    folder = copy_checkpoints(finished, tmp_path / "run", 2, 4, 5)
    train(folder, inputs, *BONE, *SHORT, "--resume", str(at(folder, 2)), "--keep_last", "2")
    assert_same(folder, finished)
    assert list(list_checkpoints(folder / "checkpoints")) == [6, 3]


def test_a_new_run_does_not_overwrite_an_unfinished_one(inputs, finished, tmp_path, capsys):
    folder = copy_checkpoints(finished, tmp_path / "run", 4)
    with pytest.raises(
        UserError, match=r"--proj_dir: .*unfinished run, after step 4 of 6\. Resume it with --resume auto"
    ):
        train(folder, inputs, *BONE, *SHORT)
    with pytest.raises(UserError, match=r"--proj_dir: .*an unfinished run"):
        train(folder, inputs, *BONE, *SHORT, "--resume", str(at(finished, 3)))
    assert list(list_checkpoints(folder / "checkpoints")) == [4]
    at(folder, 6).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"--proj_dir: .*newest checkpoint, of step 6, cannot be read\. Resume it"):
        train(folder, inputs, *BONE, *SHORT)
    at(folder, 6).write_bytes(at(finished, 6).read_bytes())
    train(folder, inputs, *BONE, "--epoch_steps", "1")
    assert "contains an earlier run" in capsys.readouterr().out
    assert list(list_checkpoints(folder / "checkpoints")) == [1]


def test_a_finished_run_continues_only_with_more_epochs(inputs, finished, tmp_path, capsys):
    folder = copy_checkpoints(finished, tmp_path / "run", 6)
    kept = (finished / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(kept)
    train(folder, inputs, *BONE, *SHORT, "--resume", "auto")
    assert "nothing left to train: all 2 epochs are done" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == kept
    flat = ["--lr_final", "1e-3"]
    train(tmp_path / "two", inputs, *BONE, *SHORT, *flat)
    train(tmp_path / "two", inputs, *BONE, *SHORT, *flat, "--resume", "auto", "--epoch_count", "3")
    train(tmp_path / "three", inputs, *BONE, *SHORT, *flat, "--epoch_count", "3")
    assert [row["loss"] for row in metrics(tmp_path / "two")] == [row["loss"] for row in metrics(tmp_path / "three")]


def test_the_metrics_of_an_earlier_run_stay(inputs, finished, tmp_path):
    """--epoch_begin appends to the metrics of an earlier run; resuming removes only the lines of its own run."""
    folder = copy_checkpoints(finished, tmp_path / "run", 6)
    (folder / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    more = [*BONE, *SHORT, "--epoch_begin", "2"]
    train(folder, inputs, *more, "--save_every", "1", "--keep_last", "9")
    expected = [row["loss"] for row in metrics(folder)]
    train(folder, inputs, *more, "--resume", str(at(folder, 2)))
    assert [row["loss"] for row in metrics(folder)] == expected
    assert [row["step"] for row in metrics(folder)] == [*range(1, 7)] * 2


# -------------------------------------------------------------------------------- checkpoints of another run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr_init", "2e-3"], r"--lr_init: 0.002 differs from the checkpoint's 0.001 \(.*step-000002"),
        (["--bone_config", '{"r":32}'], r"--bone_config r: 32 differs from the checkpoint's 16"),
        (["--bone_config", '{"r":16,"mode":"col"}'], r"--bone_config mode: col differs from the checkpoint's row"),
        (["--peft", "miss", "--peft_config", '{"r":16}'], r"--peft: miss differs from the checkpoint's bone"),
        (["--train_parts", "time"], r"--train_parts: \[\"time\"\] differs from the checkpoint's \[\"ln\"\]"),
        (["--ctx_len", "32"], r"--ctx_len: 32 differs from the checkpoint's 48"),
        (["--micro_bsz", "2"], r"--micro_bsz: 2 over all devices differs from the checkpoint's 4"),
        (["--accumulate_grad_batches", "3"], r"--accumulate_grad_batches: 3 differs from the checkpoint's 1"),
        (["--random_seed", "1"], r"--random_seed: 1 differs from the checkpoint's 42"),
        (["--precision", "bf16"], r"--precision: bfloat16 differs from the checkpoint's float32"),
        (["--dataload", "get"], r"--dataload: get differs from the checkpoint's pad"),
        (["--epoch_count", "1"], r"--epoch_count: 1 is less than the checkpoint's 2 .* Use 2 or more"),
        (["--quant", "nf4"], r"--quant: nf4 differs from the checkpoint's none"),
    ],
)
def test_a_changed_setting_is_refused(flags, message, inputs, finished, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", inputs, *BONE, *SHORT, "--resume", str(at(finished, 2)), *flags)
    assert not (tmp_path / "run").exists()


def test_another_base_or_data_is_refused(inputs, finished, tmp_path):
    resume = ["--resume", str(at(finished, 2))]
    write_base(tmp_path / "base.pth", SHAPE, seed=3)
    with pytest.raises(UserError, match="--load_model: is another base model than that of"):
        train(tmp_path / "run", ["--load_model", f"{tmp_path}/base.pth", *inputs[2:]], *BONE, *SHORT, *resume)
    write_base(tmp_path / "wide.pth", with_shape(vocab_size=257, n_layer=1))
    with pytest.raises(UserError, match=r"--n_layer: 1 differs from the checkpoint's 2"):
        train(tmp_path / "run", ["--load_model", f"{tmp_path}/wide.pth", *inputs[2:]], *BONE, *SHORT, *resume)
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(tmp_path / "data", tokenizer) as writer:
        writer.add_document([*tokenizer.encode("Something else."), tokenizer.eod])
    with pytest.raises(
        UserError, match=r"--data_file: differs from the data .*found documents, tokens, share \[\[1, 16"
    ):
        train(tmp_path / "run", [*inputs[:2], "--data_file", f"{tmp_path}/data"], *BONE, *SHORT, *resume)


def test_a_random_seed_is_taken_from_the_checkpoint(inputs, finished, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    train(tmp_path / "run", inputs, *BONE, *SHORT, "--resume", str(at(finished, 2)), "--random_seed", "-1")
    assert_same(tmp_path / "run", finished)


def test_files_may_have_moved_and_memory_saving_may_change(inputs, finished, tmp_path):
    for name in ("base.pth", "data.bin", "data.idx", "data.meta.json"):
        (tmp_path / name).write_bytes((Path(inputs[1]).parent / name).read_bytes())
    moved = ["--load_model", f"{tmp_path}/base.pth", "--data_file", f"{tmp_path}/data"]
    train(tmp_path / "run", moved, *BONE, *SHORT, "--resume", str(at(finished, 2)), "--grad_cp", "1")
    for a, b in zip(metrics(tmp_path / "run"), metrics(finished), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_a_second_run_in_the_folder_is_refused(inputs, tmp_path):
    with (
        lock_run_folder(tmp_path / "run"),
        pytest.raises(UserError, match=f"in use by a run, process {os.getpid()} on"),
    ):
        train(tmp_path / "run", inputs, *BONE, *SHORT)
    train(tmp_path / "run", inputs, *BONE, "--epoch_steps", "1")


# ------------------------------------------------------------------------------------------- full disks


def fail_from(monkeypatch, first: int, last: int) -> None:
    """Let the disk be full when the checkpoints of these steps are written."""
    write_hashed = checkpoints._write_hashed

    def write(file, parts):
        if first <= int(re.search(r"step-(\d+)", file.name)[1]) <= last:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_hashed(file, parts)

    monkeypatch.setattr(checkpoints, "_write_hashed", write)


def test_a_full_disk_does_not_stop_a_run(inputs, finished, tmp_path, monkeypatch, capsys):
    fail_from(monkeypatch, 3, 5)
    train(tmp_path / "run", inputs, *BONE, *SHORT, "--save_every", "1", "--keep_last", "2")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == 3
    assert re.search(
        r"step-000003.*No space left on device.*Training continues; the last checkpoint is of step 2\.$", lines[0]
    )
    assert_same(tmp_path / "run", finished)
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [6, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_full_disk_at_the_end_is_an_error(inputs, tmp_path, monkeypatch):
    fail_from(monkeypatch, 6, 6)
    with pytest.raises(CheckpointError, match=r"step-000006.* cannot be written \(.*No space left"):
        train(tmp_path / "run", inputs, *BONE, *SHORT)
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [3]
    assert saved(tmp_path / "run"), "the adapter is saved all the same"


def test_metrics_are_written_once_the_disk_has_room_again(tmp_path, capsys):
    """/dev/full stands for a full disk. Nothing is lost."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    first, second = (StepMetrics(step, 1.0, 0.1, 8, 9.0, 0.5, 2.0) for step in (1, 2))
    write = MetricsFile(tmp_path / "metrics.jsonl")
    kept = os.dup(write.file.fileno())
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), write.file.fileno())
    write(first)
    write(first)
    assert capsys.readouterr().err.count("metrics.jsonl: cannot be written") == 1
    os.dup2(kept, write.file.fileno())
    write(second)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 1, 2]
