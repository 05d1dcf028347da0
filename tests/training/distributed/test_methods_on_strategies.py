"""Every method under every strategy: two processes train what one does.

The pair recomputes its blocks in the backward pass (`--grad_cp 1`) and the one does not, which tests both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from rwkv_peft.base_model import load_base
from rwkv_peft.config import flags as cli
from rwkv_peft.data.binidx.writer import BinidxWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.peft.adapter_file import read_adapter
from rwkv_peft.training.run import run
from tests.helpers import relative_error, with_shape, write_base
from tests.peft.cases import CASES, MODEL_CASES
from tests.training.distributed.pairs import in_a_pair

RUNS = [
    *[(method, options, "none") for method, options in [*CASES, *MODEL_CASES] if not options.get("dropout")],
    ("pissa", {"r": 4}, "nf4"),
    ("bone", {"r": 16, "mode": "col"}, "int8"),
]
"""Method, options, quantisation. Dropout draws other numbers in other processes."""
STRATEGIES = ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
STEPS = 3


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    losses: list[float]
    grad_norms: list[float]
    tensors: dict[str, Tensor]
    """What it saved."""


def flags_of(folder: Path, out: str, *more: str) -> list[list[str]]:
    """The flags of all runs, each in a folder of its own below `out`."""
    common = f"--load_model {folder}/base.pth --data_file {folder}/data --ctx_len 32 --epoch_steps {STEPS}".split()
    # An epsilon above rounding: Adam's first steps are else as large as the rate whatever the gradient, and one near 0
    # shows the order of its sums.
    rates = "--accelerator cpu --precision fp32 --lr_init 1e-3 --lr_final 1e-3 --adam_eps 1e-4".split()
    return [
        [*common, *rates, "--peft", method, "--peft_config", json.dumps(options), "--quant", quant, *more,
         "--proj_dir", str(folder / out / str(number))]
        for number, (method, options, quant) in enumerate(RUNS)
    ]  # fmt: skip


def results(folder: Path) -> list[Result]:
    """Of all runs below a folder."""
    return [result_of(folder / str(number)) for number in range(len(RUNS))]


def result_of(folder: Path) -> Result:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (saved,) = folder.glob("rwkv-0.*")
    tensors = load_base(saved) if saved.suffix == ".pth" else read_adapter(saved)[0]
    return Result([row["loss"] for row in rows], [row["grad_norm"] for row in rows], tensors)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base and a small data set."""
    folder = tmp_path_factory.mktemp("methods")
    write_base(folder / "base.pth", with_shape(vocab_size=257))
    tokenizer = load_tokenizer("bytes")
    with BinidxWriter(folder / "data", tokenizer) as writer:
        for number in range(100):
            writer.add_document([*tokenizer.encode(f"{number} and {number} are {2 * number}."), tokenizer.eod])
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path) -> list[Result]:
    """The runs in one process, with the whole batch."""
    for flags in flags_of(inputs, "alone", "--micro_bsz", "4"):
        run(cli.resolve(cli.parse_args(flags)))
    return results(inputs / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_does(strategy: str, inputs: Path, alone: list[Result]):
    """Losses, gradient norms, and exactly the same saved tensors, for every method."""
    more = ["--micro_bsz", "2", "--devices", "2", "--strategy", strategy, "--grad_cp", "1"]
    in_a_pair(flags_of(inputs, strategy, *more), inputs / f"{strategy}.json")
    for case, pair, one in zip(RUNS, results(inputs / strategy), alone, strict=True):
        assert len(one.losses) == STEPS
        assert pair.losses == pytest.approx(one.losses, rel=1e-5), case
        assert pair.grad_norms == pytest.approx(one.grad_norms, rel=1e-4), case
        assert {name: t.shape for name, t in pair.tensors.items()} == {name: t.shape for name, t in one.tensors.items()}
        for name, tensor in one.tensors.items():
            assert pair.tensors[name].dtype == tensor.dtype
            assert relative_error(pair.tensors[name], tensor) < 1e-4, (case, name)
