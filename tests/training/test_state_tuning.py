"""Tuning the state that texts begin with: what trains, the file, and that the `rwkv` package begins with it too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.adapted_model import load_plain, tune_state
from rwkv_peft.base_model import load_base, save_base
from rwkv_peft.config import flags as cli
from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.errors import UserError
from rwkv_peft.evaluation.loss import held_out_loss
from rwkv_peft.export.merge import merge_state
from rwkv_peft.inference.generate import generate
from rwkv_peft.model.init import model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.model.state import LayerState
from tests.helpers import TINY, lively_model, relative_error, write_base
from tests.peft.definitions import loss_and_gradients, tokens, train_a_little
from tests.tools.test_merge import client
from tests.training.small_runs import SHAPE, train, write_inputs

ROOT = Path(__file__).resolve().parents[2]
STATE = "--train_type state --lr_init 1 --lr_final 0.1".split()
NAMES = [f"blocks.{layer}.att.time_state" for layer in range(TINY.n_layer)]


def tuned_model(dtype: torch.dtype = torch.float64, **options) -> RWKV6:
    """With a state that is not zero."""
    model = model_from_state(TINY, lively_model().state_dict(), "lively", **options)
    tune_state(model, PeftConfig())
    train_a_little(model, std=1.0)
    model.dtype = dtype
    return model.to(dtype)


def test_it_is_the_state_before_the_first_token():
    """Against a model that is handed it, for each row, with the axes turned as the file has them: [value][key]."""
    model, plain, ids = tuned_model(), lively_model().double(), tokens(batch=3)
    plain.dtype = torch.float64
    shift = torch.zeros(3, TINY.n_embd, dtype=torch.float64)
    leaves = [block.att.time_state.detach().clone().requires_grad_() for block in model.blocks]
    state = [LayerState(shift, leaf.transpose(1, 2).expand(3, -1, -1, -1), shift) for leaf in leaves]
    hidden, _ = plain.hidden(ids[:, :-1], state)
    expected = plain.loss(hidden, ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
    loss, gradients = loss_and_gradients(model, ids)
    assert relative_error(loss, expected) < 1e-12
    assert list(gradients) == NAMES, "nothing else trains"
    for name, theirs in zip(NAMES, torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(gradients[name], theirs) < 1e-10
        assert theirs.norm() > 0


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_every_backend_and_recomputed_blocks(backend, grad_cp):
    _, exact = loss_and_gradients(tuned_model(), tokens())
    _, gradients = loss_and_gradients(tuned_model(torch.float32, wkv_backend=backend, grad_cp=grad_cp), tokens())
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact[name]) < 1e-4


def test_it_starts_at_zero_and_trains_in_fp32():
    model = model_from_state(TINY, lively_model().state_dict(), "lively", dtype=torch.bfloat16)
    before = model(tokens())[0]
    tune_state(model, PeftConfig())
    assert torch.equal(model(tokens())[0], before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == NAMES
    assert {(p.dtype, tuple(p.shape)) for p in trained.values()} == {(torch.float32, (2, 32, 32))}


def test_several_texts_in_a_row_are_refused():
    with pytest.raises(ValueError, match="cannot each begin with the tuned state"):
        tuned_model().hidden(tokens(), starts=torch.zeros_like(tokens(), dtype=torch.bool))


def logits_of(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0]


def test_train_merge_and_the_rwkv_package_agrees(tmp_path):
    """The README's way: a run, tools/merge.py, and any RWKV program; then on from there."""
    inputs = write_inputs(tmp_path)
    rows = train(tmp_path / "run", inputs, *STATE)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    tuned = load_base(tmp_path / "run/rwkv-0.pth")
    assert list(tuned) == NAMES
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}

    words = ["--base_model", inputs[1], "--adapter", tmp_path / "run/rwkv-0.pth", "--output", tmp_path / "merged.pth"]
    command = [sys.executable, "tools/merge.py", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "merged the states of 2 layers, 4,096 numbers" in result.stdout
    merged = load_base(tmp_path / "merged.pth")
    assert [key for key in merged if key not in NAMES] == list(load_base(inputs[1]))
    assert all(torch.equal(merged[name], tuned[name]) for name in NAMES)

    ids = torch.randint(257, (29,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = logits_of(load_plain(tmp_path / "merged.pth"), ids)
    theirs = client(tmp_path / "merged.pth").forward(ids, None, full_output=True)[0]
    assert relative_error(ours, theirs) < 1e-5
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - logits_of(load_plain(inputs[1]), ids)).abs().max() > 0.1, "training moved it"

    model, base = load_plain(tmp_path / "merged.pth"), load_plain(inputs[1])
    assert held_out_loss(model, inputs[3], ctx_len=48) < held_out_loss(base, inputs[3], ctx_len=48)
    start = ids[:4]
    for token in generate(model, start[:], max_tokens=5, temperature=0, stop=-1):
        assert token == int(logits_of(model, start)[-1].argmax())
        start.append(token)

    again = train(tmp_path / "on", ["--load_model", f"{tmp_path}/merged.pth", *inputs[2:]], *STATE)
    assert again[0]["loss"] < rows[0]["loss"] - 0.05, "a merged state is where the next run begins"
    merge_state(tmp_path / "merged.pth", tmp_path / "on/rwkv-0.pth", tmp_path / "replaced.pth", torch.bfloat16)
    replaced, next_state = load_base(tmp_path / "replaced.pth"), load_base(tmp_path / "on/rwkv-0.pth")
    assert list(replaced) == list(merged)
    assert all(torch.equal(replaced[name], next_state[name].bfloat16()) for name in NAMES)


def test_an_adapter_on_a_base_with_a_state_keeps_it(tmp_path):
    inputs = write_inputs(tmp_path)
    save_base({name: torch.randn(2, 32, 32) for name in NAMES}, tmp_path / "state.pth")
    merge_state(inputs[1], tmp_path / "state.pth", tmp_path / "merged.pth")
    train(tmp_path / "run", ["--load_model", f"{tmp_path}/merged.pth", *inputs[2:]])
    whole = load_base(tmp_path / "run/rwkv-0.pth")
    assert list(whole) == list(load_base(tmp_path / "merged.pth")), "full training trains and saves it"
    with pytest.raises(UserError, match=r"--dataload: pack clears .*found .*merged.pth, which holds one"):
        train(tmp_path / "pack", ["--load_model", f"{tmp_path}/merged.pth", *inputs[2:]], "--dataload", "pack")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peft", "bone"], "--peft: has no place beside --train_type state, .*; found bone"),
        (["--train_parts", "time", "ln"], "--train_parts: has no place beside --train_type state.*found time ln"),
        (["--dataload", "pack"], "--dataload: pack clears the model's state .*; found --train_type state"),
    ],
)
def test_what_does_not_go_with_it(flags, message):
    argv = [*STATE, *flags, "--n_layer", "1", "--n_embd", "64", "--dry_run"]
    with pytest.raises(UserError, match=message):
        cli.resolve(cli.parse_args(argv))


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    base = write_base(tmp_path / "base.pth", SHAPE)
    save_base({name: torch.zeros(2, 32, 32) for name in NAMES}, tmp_path / "state.pth")
    for number, (change, message) in enumerate(
        (
            ({NAMES[0]: torch.zeros(4, 16, 16)}, r"time_state has another shape; found \(4, 16, 16\), expected"),
            ({"blocks.2.att.time_state": torch.zeros(2, 32, 32)}, r"unknown: blocks\.2\.att\.time_state"),
        )
    ):
        wrong = tmp_path / f"{number}.pth"
        save_base(load_base(tmp_path / "state.pth") | change, wrong)
        with pytest.raises(UserError, match=message):
            merge_state(base, wrong, tmp_path / "out.pth")
    with pytest.raises(UserError, match="would overwrite the base model"):
        merge_state(base, tmp_path / "state.pth", base)
    with pytest.raises(UserError, match=r"state.pth: wrong kind of model; found a tuned state without its base"):
        load_plain(tmp_path / "state.pth")
