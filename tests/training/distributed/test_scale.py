"""The losses of a run do not depend on how many processes and micro-batches share an optimizer step.

Answers have 1 to 30 tokens and some documents have none, so ranks and micro-batches have very different numbers of
tokens in the loss, often none. An epoch's last micro-batch is filled up, and its last optimizer step has 2
micro-batches instead of 3.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.base_model import BaseModel
from rwkv_peft.config.sections import RunConfig, TrainConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.training_data import open_data
from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_from_state
from rwkv_peft.ops.cross_entropy import masked_cross_entropy
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.run_config import config_from_argv
from rwkv_peft.training.distributed.offload import cpu_adamw
from tests.helpers import relative_error, with_shape, write_base
from tests.training.distributed.pairs import PairRun, in_a_pair
from tests.training.small_runs import metrics, train_flags

DOCUMENTS = 57
STEPS = 20
STRATEGIES = [name for name in typing.get_args(typing.get_type_hints(TrainConfig)["strategy"]) if name != "auto"]
HEAD_TOO = ["--peft_targets", "att", "head", "--bone_config", '{"r":1}']
"""1 is the only block size that divides its 257 rows."""
TRAINED = 2 * (7 * 64 * 16 + 128 * 16)
"""Elements that Bone r=16 trains here: in each block, seven matrices with 64 inputs and one with 128."""


def write_data(folder: Path) -> None:
    """Write a small base, and documents whose answers have very different lengths."""
    write_base(folder / "base.pth", with_shape(vocab_size=257))
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(folder / "data", tokenizer) as writer:
        for number in range(DOCUMENTS):
            answer = "x" * (1 + 7 * number % 30)
            text = f"User: {number}?\n\nAssistant: {answer}" if number % 4 else f"No answer to {number}."
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])


def flags_of(folder: Path, name: str, *more: str) -> list[str]:
    """Return the flags of a run of 20 steps in `folder/name`."""
    common = f"--load_model {folder}/base.pth --data_file {folder}/data --dataload pad --loss_mask qa --ctx_len 64"
    # Without an epsilon, Adam's first steps are as large as the learning rate for every gradient, even one near 0.
    steps = "--epoch_count 2 --epoch_save 2 --accumulate_grad_batches 3 --lr_init 1e-3 --lr_final 1e-3 --adam_eps 1e-4"
    words = f"{common} {steps} --accelerator cpu --peft bone --proj_dir {folder}/{name}".split()
    return [*words, "--bone_config", '{"r":16}', *more]


def in_one(folder: Path, name: str, *more: str) -> list[dict]:
    """Make a run in this process, and return the lines of its metrics.jsonl."""
    train_flags(flags_of(folder, name, "--micro_bsz", "2", *more))
    return metrics(folder / name)


def largest_difference(pair: list[dict], one: list[dict], key: str = "loss") -> float:
    """Return the largest relative difference of any step."""
    return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-9) for a, b in zip(pair, one, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with their base and data."""
    path = tmp_path_factory.mktemp("scale")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict]:
    return in_one(folder, "alone", "--precision", "fp32")


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(folder: Path, alone: list[dict]):
    """Under every strategy. Every other one recomputes its blocks, which the single process does not."""
    runs = [
        flags_of(folder, name, "--strategy", name, "--micro_bsz", "1", "--grad_cp", str(number % 2))
        for number, name in enumerate(STRATEGIES)
    ]
    in_a_pair([PairRun(flags) for flags in runs], folder / "runs.json")
    for name in STRATEGIES:
        pair = metrics(folder / name)
        assert len(pair) == len(alone) == STEPS
        assert largest_difference(pair, alone) < 1e-5, name
        assert largest_difference(pair, alone, "grad_norm") < 1e-4, name
        assert [row["tokens"] for row in pair] == [row["tokens"] for row in alone]
        check_adapter(folder / name, folder / "alone")
        check_optimizer(folder / name, copies=2 if name == "ddp" else 1)


def check_adapter(folder: Path, reference: Path) -> None:
    found, _ = read_adapter(folder / "rwkv-1.safetensors")
    expected, _ = read_adapter(reference / "rwkv-1.safetensors")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-4, folder


def check_optimizer(folder: Path, copies: int) -> None:
    """Check that the optimizers have two moments of each trainable element, and a little padding under ZeRO."""
    counts = [json.loads((folder / f"optimizer-{rank}.json").read_text()) for rank in range(2)]
    moments = sum(count["moments"] for count in counts)
    assert 2 * TRAINED * copies <= moments <= 2 * TRAINED * copies * 1.01, folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Tensor]]:
    """All rows of the run's first epoch, in order."""
    config = config_of(folder)
    return list(open_data(config.data).first_samples(2 * 29))


def config_of(folder: Path) -> RunConfig:
    return config_from_argv(flags_of(folder, "exact", "--micro_bsz", "2"))


def exact_step(folder: Path, rows: list[dict[str, Tensor]]) -> tuple[float, int, dict[str, Tensor]]:
    """Return loss, tokens in the loss, and gradients of an untrained adapter, in float64 and without any splitting."""
    base = BaseModel.open(folder / "base.pth")
    model = model_from_state(base.shape, base.tensors, base.path, dtype=torch.float64).double()
    add_adapter(model, config_of(folder).peft)
    model = model.double()
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    loss = masked_cross_entropy(model(whole["input_ids"])[0], whole["targets"], whole["loss_mask"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return float(loss.detach()), int(whole["loss_mask"].sum()), dict(zip(trained, gradients, strict=True))


def test_a_step_is_the_mean_over_all_its_tokens(folder: Path, rows: list[dict[str, Tensor]]):
    """Compare every trained element with float64. Adam's first step is g / (|g| + epsilon)."""
    loss, tokens, gradients = exact_step(folder, rows[:6])
    (row,) = in_one(folder, "step", "--epoch_steps", "3", "--epoch_count", "1", "--grad_clip", "0")
    assert row["tokens"] == tokens
    assert row["loss"] == pytest.approx(loss, rel=1e-6)
    assert row["grad_norm"] == pytest.approx(float(sum(g.square().sum() for g in gradients.values())) ** 0.5, rel=1e-5)
    trained, _ = read_adapter(folder / "step" / "rwkv-0.safetensors")
    assert set(trained) == set(gradients)
    for name, gradient in gradients.items():
        assert relative_error(trained[name], -1e-3 * gradient / (gradient.abs() + 1e-4)) < 1e-4, name


def test_a_shorter_last_step_is_the_mean_over_its_tokens(folder: Path, rows: list[dict[str, Tensor]]):
    """The step has 2 micro-batches, although --accumulate_grad_batches is 3."""
    loss, tokens, gradients = exact_step(folder, rows[:4])
    (row,) = in_one(folder, "short", "--epoch_steps", "2", "--epoch_count", "1", "--grad_clip", "0")
    assert (row["tokens"], row["loss"]) == (tokens, pytest.approx(loss, rel=1e-6))
    assert row["grad_norm"] == pytest.approx(float(sum(g.square().sum() for g in gradients.values())) ** 0.5, rel=1e-5)


def test_tokens_are_counted_exactly(alone: list[dict], rows: list[dict[str, Tensor]]):
    counts = [sum(int(row["loss_mask"].sum()) for row in rows[first : first + 6]) for first in range(0, 58, 6)]
    assert [row["tokens"] for row in alone[:10]] == counts
    assert max(counts) > 3 * min(counts), "the steps must have very different counts"


@pytest.mark.parametrize("more", [[], HEAD_TOO], ids=["plain", "adapter on the head"])
def test_a_step_without_tokens_in_the_loss_has_no_gradient(more: list[str], tmp_path: Path):
    write_base(tmp_path / "base.pth", with_shape(vocab_size=257))
    with BinidxWriter(tmp_path / "data", load_tokenizer("bytes")) as writer:
        writer.add_document([5, 6, 7, 0])
        for _ in range(5):
            writer.add_document([0])  # its only token is not a target
    rows = in_one(tmp_path, "run", "--loss_mask", "pad", "--accumulate_grad_batches", "1", *more)
    empty = [row for row in rows if row["tokens"] == 0]
    assert len(empty) == 4
    assert all(row["loss"] == row["grad_norm"] == 0 for row in empty)
    assert all(row["tokens"] == 3 and row["loss"] > 1 and row["grad_norm"] > 0 for row in rows if row not in empty)
    trained, _ = read_adapter(tmp_path / "run" / "rwkv-1.safetensors")
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in trained.values())


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_offloaded_optimizer_is_adamw(weight_decay: float):
    """Compare with torch's: decoupled weight decay, betas, epsilon, and a changing learning rate, for two groups."""
    sizes = [(33, 7), (128,)]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5}
    sides = []
    for make in (torch.optim.AdamW, cpu_adamw):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
        groups = [{"params": [p], "weight_decay": weight_decay * (p.ndim > 1)} for p in parameters]
        sides.append((parameters, make(groups, **options), generator))
    for step in range(20):
        for parameters, optimizer, generator in sides:
            for parameter, group in zip(parameters, optimizer.param_groups, strict=True):
                parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (-step % 4)
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    for ours, theirs in zip(sides[1][0], sides[0][0], strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_offload_without_a_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"--strategy: offload .*'no-such-compiler' is not on PATH.*without _offload"):
        cpu_adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}])


def test_a_failed_build_of_the_offload_optimizer_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the op failed to load") from RuntimeError("[1/2] c++\na.cpp:3: error: no omp.h\nstop")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam.__init__", fails)
    with pytest.raises(ConfigError, match=r"--strategy: offload .*found a.cpp:3: error: no omp.h\. Fix"):
        cpu_adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}])
