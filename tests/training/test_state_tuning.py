"""State tuning: trainable parameters, the saved file, and that the `rwkv` package starts from the same state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.adapted_model import load_plain, tune_state
from rwkv_peft.base_model import load_base, save_base
from rwkv_peft.config.sections import PeftConfig
from rwkv_peft.errors import UserError
from rwkv_peft.evaluation.loss import validation_loss
from rwkv_peft.export.merge import merge_state
from rwkv_peft.inference.generate import generate
from rwkv_peft.model.init import model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.model.state import LayerState
from tests.helpers import TINY, lively_model, relative_error, write_base
from tests.peft.definitions import loss_and_gradients, tokens, train_a_little
from tests.tools.test_merge import client
from tests.training.small_runs import SHAPE, config_of, train, write_inputs

ROOT = Path(__file__).resolve().parents[2]
STATE = "--train_type state --lr_init 1 --lr_final 0.1".split()
NAMES = [f"blocks.{layer}.att.time_state" for layer in range(TINY.n_layer)]


def tuned_model(dtype: torch.dtype = torch.float64, **options) -> RWKV6:
    """Return a model whose initial state is not zero."""
    model = model_from_state(TINY, lively_model().state_dict(), "lively", **options)
    tune_state(model, PeftConfig())
    train_a_little(model, std=1.0)
    model.dtype = dtype
    return model.to(dtype)


def test_the_tuned_state_comes_before_the_first_token():
    """Compare with a model that receives the state as an argument. The file stores it as [value][key]."""
    model, plain, ids = tuned_model(), lively_model().double(), tokens(batch=3)
    plain.dtype = torch.float64
    shift = torch.zeros(3, TINY.n_embd, dtype=torch.float64)
    leaves = [block.att.time_state.detach().clone().requires_grad_() for block in model.blocks]
    state = [LayerState(shift, leaf.transpose(1, 2).expand(3, -1, -1, -1), shift) for leaf in leaves]
    hidden, _ = plain.hidden(ids[:, :-1], state)
    expected = plain.loss(hidden, ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))
    loss, gradients = loss_and_gradients(model, ids)
    assert relative_error(loss, expected) < 1e-12
    assert list(gradients) == NAMES, "no other parameter is trainable"
    for name, theirs in zip(NAMES, torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(gradients[name], theirs) < 1e-10
        assert theirs.norm() > 0


@pytest.mark.parametrize(("backend", "grad_cp"), [("native", True), ("torch", False), ("reference", False)])
def test_every_backend_and_checkpointing(backend, grad_cp):
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


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match="a tuned initial state cannot be used with several texts"):
        tuned_model().hidden(tokens(), starts=torch.zeros_like(tokens(), dtype=torch.bool))


def logits_of(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0]


@pytest.mark.slow
def test_train_merge_and_the_rwkv_package_agrees(tmp_path):
    """Train, merge with tools/merge.py, load with the `rwkv` package, and train again from the merged file."""
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
    assert "merged the initial states of 2 layers (4,096 elements)" in result.stdout
    merged = load_base(tmp_path / "merged.pth")
    assert [key for key in merged if key not in NAMES] == list(load_base(inputs[1]))
    assert all(torch.equal(merged[name], tuned[name]) for name in NAMES)

    ids = torch.randint(257, (29,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = logits_of(load_plain(tmp_path / "merged.pth"), ids)
    theirs = client(tmp_path / "merged.pth").forward(ids, None, full_output=True)[0]
    assert relative_error(ours, theirs) < 1e-5
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - logits_of(load_plain(inputs[1]), ids)).abs().max() > 0.1, "training changed the state"

    model, base = load_plain(tmp_path / "merged.pth"), load_plain(inputs[1])
    assert validation_loss(model, inputs[3], ctx_len=48) < validation_loss(base, inputs[3], ctx_len=48)
    start = ids[:4]
    for token in generate(model, start[:], max_tokens=5, temperature=0, stop=-1):
        assert token == int(logits_of(model, start)[-1].argmax())
        start.append(token)

    again = train(tmp_path / "on", ["--load_model", f"{tmp_path}/merged.pth", *inputs[2:]], *STATE)
    assert again[0]["loss"] < rows[0]["loss"] - 0.05, "the next run starts from the merged state"
    merge_state(tmp_path / "merged.pth", tmp_path / "on/rwkv-0.pth", tmp_path / "replaced.pth", torch.bfloat16)
    replaced, next_state = load_base(tmp_path / "replaced.pth"), load_base(tmp_path / "on/rwkv-0.pth")
    assert list(replaced) == list(merged)
    assert all(torch.equal(replaced[name], next_state[name].bfloat16()) for name in NAMES)


def test_full_training_of_a_base_with_a_state_keeps_it(tmp_path):
    inputs = write_inputs(tmp_path)
    save_base({name: torch.randn(2, 32, 32) for name in NAMES}, tmp_path / "state.pth")
    merge_state(inputs[1], tmp_path / "state.pth", tmp_path / "merged.pth")
    train(tmp_path / "run", ["--load_model", f"{tmp_path}/merged.pth", *inputs[2:]])
    whole = load_base(tmp_path / "run/rwkv-0.pth")
    assert list(whole) == list(load_base(tmp_path / "merged.pth")), "full training trains and saves the state"
    with pytest.raises(UserError, match=r"--dataload: .*found .*merged.pth, which has a tuned state"):
        train(tmp_path / "pack", ["--load_model", f"{tmp_path}/merged.pth", *inputs[2:]], "--dataload", "pack")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peft", "bone"], "--peft.*--train_type state.*found bone"),
        (["--train_parts", "time", "ln"], "--train_parts.*--train_type state.*found time ln"),
        (["--dataload", "pack"], "--dataload: .*found --train_type state"),
    ],
)
def test_flags_that_cannot_be_combined_with_state_tuning(flags, message):
    argv = [*STATE, *flags, "--n_layer", "1", "--n_embd", "64", "--dry_run"]
    with pytest.raises(UserError, match=message):
        config_of(argv)


def test_a_state_of_another_shape_is_refused(tmp_path):
    base = write_base(tmp_path / "base.pth", SHAPE)
    save_base({name: torch.zeros(2, 32, 32) for name in NAMES}, tmp_path / "state.pth")
    for number, (change, message) in enumerate(
        (
            ({NAMES[0]: torch.zeros(4, 16, 16)}, r"time_state has the wrong shape; found \(4, 16, 16\), expected"),
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
