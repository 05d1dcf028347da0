"""One truth: the losses of a run do not depend on how many processes and batches share its optimizer steps.

Answers are of 1 to 30 tokens and some documents have none, so that ranks and batches train very unequal counts, often
none at all. An epoch's last batch is filled up, and its last optimizer step is of 2 batches, not of 3.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.base_model import load_base
from rwkv_peft.config import flags as cli
from rwkv_peft.config.sections import RunConfig, TrainConfig
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.datamodule import BinidxDataModule
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_from_state
from rwkv_peft.ops.wkv6.reference import masked_cross_entropy
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.distributed.offload import cpu_adamw
from rwkv_peft.training.run import run
from tests.helpers import relative_error, with_shape, write_base
from tests.training.distributed.pairs import in_a_pair

DOCUMENTS = 57
STEPS = 20
STRATEGIES = [name for name in typing.get_args(typing.get_type_hints(TrainConfig)["strategy"]) if name != "auto"]
HEAD_TOO = ["--peft_targets", "att", "head", "--bone_config", '{"r":1}']
"""Its 257 rows have no other divisor."""
TRAINED = 2 * (7 * 64 * 16 + 128 * 16)
"""Numbers that Bone r=16 trains here: per block, seven matrices of 64 inputs and one of 128."""


def write_data(folder: Path) -> None:
    """A small base, and documents whose answers are of very unequal length."""
    write_base(folder / "base.pth", with_shape(vocab_size=257))
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(folder / "data", tokenizer) as writer:
        for number in range(DOCUMENTS):
            answer = "x" * (1 + 7 * number % 30)
            text = f"User: {number}?\n\nAssistant: {answer}" if number % 4 else f"No answer to {number}."
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])


def flags_of(folder: Path, name: str, *more: str) -> list[str]:
    """Of a run of 20 steps in `folder/name`."""
    common = f"--load_model {folder}/base.pth --data_file {folder}/data --dataload pad --loss_mask qa --ctx_len 64"
    # An epsilon above rounding: Adam's first steps are else as large as the rate whatever the gradient is.
    steps = "--epoch_count 2 --epoch_save 2 --accumulate_grad_batches 3 --lr_init 1e-3 --lr_final 1e-3 --adam_eps 1e-4"
    words = f"{common} {steps} --accelerator cpu --peft bone --proj_dir {folder}/{name}".split()
    return [*words, "--bone_config", '{"r":16}', *more]


def in_one(folder: Path, name: str, *more: str) -> list[dict]:
    """The lines of metrics.jsonl of a run in this process."""
    run(cli.resolve(cli.parse_args(flags_of(folder, name, "--micro_bsz", "2", *more))))
    return metrics(folder / name)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(pair: list[dict], one: list[dict], key: str = "loss") -> float:
    """Over steps, relative."""
    return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-9) for a, b in zip(pair, one, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs are, with their base and data."""
    path = tmp_path_factory.mktemp("scale")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict]:
    return in_one(folder, "alone", "--precision", "fp32")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Path:
    """All strategies, by one pair of processes; every other one recomputes its blocks, which `alone` does not."""
    runs = [
        flags_of(folder, name, "--strategy", name, "--devices", "2", "--micro_bsz", "1", "--grad_cp", str(number % 2))
        for number, name in enumerate(STRATEGIES)
    ]
    in_a_pair(runs, folder / "runs.json")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_losses_of_one(strategy: str, pairs: Path, alone: list[dict]):
    pair = metrics(pairs / strategy)
    assert len(pair) == len(alone) == STEPS
    assert largest_difference(pair, alone) < 1e-5
    assert largest_difference(pair, alone, "grad_norm") < 1e-4
    assert [row["tokens"] for row in pair] == [row["tokens"] for row in alone]
    ours, _ = read_adapter(pairs / strategy / "rwkv-1.safetensors")
    theirs, _ = read_adapter(pairs / "alone" / "rwkv-1.safetensors")
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_optimizer_holds_what_trains_and_no_more(strategy: str, pairs: Path):
    """Two moments of each trained number: in each process under ddp, shared out (and filled up a little) by ZeRO."""
    held = [json.loads((pairs / strategy / f"optimizer-{rank}.json").read_text()) for rank in range(2)]
    moments = sum(counts["moments"] for counts in held)
    copies = 2 if strategy == "ddp" else 1
    assert 2 * TRAINED * copies <= moments <= 2 * TRAINED * copies * 1.01


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Tensor]]:
    """All rows of the run's first epoch, in order, read one at a time."""
    config = config_of(folder)
    data = BinidxDataModule(config.data, 257)
    data.setup()
    return list(data.first_samples(2 * 29))


def config_of(folder: Path) -> RunConfig:
    return cli.resolve(cli.parse_args(flags_of(folder, "exact", "--micro_bsz", "2")))


def exact_step(folder: Path, rows: list[dict[str, Tensor]]) -> tuple[float, int, dict[str, Tensor]]:
    """Loss, trained tokens, gradients of an untrained adapter: the sum over all tokens of all rows by their count."""
    config = config_of(folder)
    model = model_from_state(config.model, load_base(config.train.load_model), "", dtype=torch.float64)
    model = model.double()
    add_adapter(model, config.peft)
    model = model.double()
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    loss = masked_cross_entropy(model(whole["input_ids"])[0], whole["targets"], whole["loss_mask"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return float(loss.detach()), int(whole["loss_mask"].sum()), dict(zip(trained, gradients, strict=True))


def test_a_step_is_the_mean_over_all_its_tokens(folder: Path, rows: list[dict[str, Tensor]]):
    """Against float64, each number that one step trained; Adam's first step is g / (|g| + epsilon)."""
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
    """Of 2 batches, where Lightning divides by 3."""
    loss, tokens, gradients = exact_step(folder, rows[:4])
    (row,) = in_one(folder, "short", "--epoch_steps", "2", "--epoch_count", "1", "--grad_clip", "0")
    assert (row["tokens"], row["loss"]) == (tokens, pytest.approx(loss, rel=1e-6))
    assert row["grad_norm"] == pytest.approx(float(sum(g.square().sum() for g in gradients.values())) ** 0.5, rel=1e-5)


def test_tokens_are_counted_exactly(alone: list[dict], rows: list[dict[str, Tensor]]):
    counts = [sum(int(row["loss_mask"].sum()) for row in rows[first : first + 6]) for first in range(0, 58, 6)]
    assert [row["tokens"] for row in alone[:10]] == counts
    assert max(counts) > 3 * min(counts), "steps of very unequal counts"


@pytest.mark.parametrize("more", [[], HEAD_TOO], ids=["plain", "adapter on the head"])
def test_a_step_without_any_trained_token_has_no_gradient(more: list[str], tmp_path: Path):
    write_base(tmp_path / "base.pth", with_shape(vocab_size=257))
    with BinidxWriter(tmp_path / "data", load_tokenizer("bytes")) as writer:
        writer.add_document([5, 6, 7, 0])
        for _ in range(5):
            writer.add_document([0])  # its one token is no target
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
    """Decoupled weight decay, betas, epsilon, and a rate that changes, for two groups; against torch's."""
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


def test_offload_without_a_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"--strategy: offload .*'no-such-compiler' is not on PATH.*without _offload"):
        cpu_adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}])


def test_offload_whose_build_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the op failed to load") from RuntimeError("[1/2] c++\na.cpp:3: error: no omp.h\nstop")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam.__init__", fails)
    with pytest.raises(ConfigError, match=r"--strategy: offload .*found a.cpp:3: error: no omp.h\. Mend"):
        cpu_adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}])
