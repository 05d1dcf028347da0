"""infctx: slices of a row have the loss and gradients of the whole row, and need the memory of one slice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.model.state import LayerState
from rwkv_peft.training.optim.initial_gradients import mean_gradients
from rwkv_peft.training.sliced_loss import sliced_loss
from tests.helpers import TINY, lively_model, peft_section, relative_error
from tests.memory.live_bytes import LiveBytes
from tests.peft.cases import CASES, MODEL_CASES
from tests.peft.definitions import gradients_of, train_a_little

TOKENS = 43
DETERMINISTIC = [case for case in [*CASES, *MODEL_CASES] if not case[1].get("dropout")]
MATERIALIZED = ("bone", {"r": 16, "impl": "materialized", "cp": 1})


def model_for(method: str, options: dict, dtype: torch.dtype = torch.float64, **more) -> RWKV6:
    model = lively_model(**more)
    torch.manual_seed(0)
    add_adapter(model, peft_section(method, options), gradients=gradients_of(model))
    if method != "none":
        train_a_little(model)
    model.dtype = dtype
    return model.to(dtype)


def batch_of(tokens: int = TOKENS, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return rows in which some slices of 8 have no tokens in the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TINY.vocab_size, (rows, tokens + 1), generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.6
    mask[:, 16:24] = False
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": mask}


def packed_batch() -> dict[str, Tensor]:
    """Return rows with several documents: some begin with a slice of 8, some inside, and one is a single token."""
    batch = batch_of()
    starts = torch.zeros_like(batch["loss_mask"])
    for row, places in enumerate(([0, 8, 9, 21, 32], [0, 15, 16, 40])):
        starts[row, places] = True
    last = torch.cat((starts[:, 1:], torch.ones(2, 1, dtype=torch.bool)), dim=1)
    return batch | {"starts": starts, "loss_mask": batch["loss_mask"] & ~last}


def whole_loss(model: RWKV6, batch: dict[str, Tensor]) -> Tensor:
    hidden, _ = model.hidden(batch["input_ids"], starts=batch.get("starts"))
    return model.loss(hidden, batch["targets"], batch["loss_mask"])


def slice_by_slice(model: RWKV6, batch: dict[str, Tensor], chunk: int = 8, full: bool = True) -> Tensor:
    """Return the loss by its definition: run the slices one after the other, without checkpointing."""
    total, state = 0.0, None
    for first in range(0, batch["input_ids"].shape[1], chunk):
        part = {key: value[:, first : first + chunk] for key, value in batch.items()}
        hidden, state = model.hidden(part["input_ids"], state)
        count = part["loss_mask"].sum()
        total = total + model.loss(hidden, part["targets"], part["loss_mask"]) * count / batch["loss_mask"].sum()
        if not full:
            state = [LayerState(s.att_shift.detach(), s.wkv.detach(), s.ffn_shift.detach()) for s in state]
    return total


def gradients(model: RWKV6, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(model: RWKV6, loss: Tensor, expected: Tensor, bound: float) -> None:
    assert relative_error(loss, expected) < bound
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert relative_error(ours[name], gradient) < bound, name


@pytest.mark.parametrize(
    ("method", "options", "grad_cp"),
    [(*case, number % 2 == 1) for number, case in enumerate([*DETERMINISTIC, MATERIALIZED])],
    ids=str,
)
def test_full_is_the_gradient_of_the_whole_row(method, options, grad_cp):
    """In float64. A prompt comes before the first slice only, and the last slice is shorter."""
    model, batch = model_for(method, options, grad_cp=grad_cp), batch_of()
    assert_same(model, sliced_loss(model, batch, 8), whole_loss(model, batch), 1e-10)


@pytest.mark.parametrize("chunk", [7, 42, 43, 44])
def test_slices_of_any_length(chunk):
    model, batch = model_for("bone", {"r": 16}), batch_of()
    assert_same(model, sliced_loss(model, batch, chunk), whole_loss(model, batch), 1e-10)


@pytest.mark.parametrize("grad_cp", [False, True])
def test_packed_rows(grad_cp):
    model, batch = model_for("none", {}, grad_cp=grad_cp), packed_batch()
    assert_same(model, sliced_loss(model, batch, 8), whole_loss(model, batch), 1e-10)
    apart = whole_loss(model, {key: value for key, value in batch.items() if key != "starts"})
    assert relative_error(apart, whole_loss(model, batch)) > 1e-4, "the starts matter"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-5), (torch.bfloat16, 3e-2)])
def test_full_in_the_precisions_of_training(dtype, bound):
    model, batch = model_for("bone", {"r": 16}, torch.float32), batch_of(tokens=301)
    model.dtype = dtype
    assert_same(model, sliced_loss(model, batch, 64), whole_loss(model, batch), bound)


@pytest.mark.parametrize("method", ["none", "prompt"])
def test_truncated_stops_gradients_between_slices(method):
    """The loss is the same as without truncation."""
    model, batch = model_for(method, {}), batch_of()
    truncated = sliced_loss(model, batch, 8, full=False)
    assert_same(model, truncated, slice_by_slice(model, batch, full=False), 1e-10)
    assert relative_error(truncated, whole_loss(model, batch)) < 1e-10
    ours = gradients(model, sliced_loss(model, batch, 8, full=False))
    theirs = gradients(model, whole_loss(model, batch))
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) > 0.01, "the gradient differs"


@pytest.mark.parametrize("grad_cp", [False, True])
def test_dropout_drops_the_same_in_the_backward_pass(grad_cp):
    model, batch = model_for("lora", {"r": 4, "dropout": 0.5}, grad_cp=grad_cp).train(), batch_of()
    losses = []
    for compute in (sliced_loss, slice_by_slice):
        torch.manual_seed(3)
        losses.append(compute(model, batch, 8))
    torch.manual_seed(4)
    assert relative_error(sliced_loss(model, batch, 8), losses[0]) > 1e-6, "it drops something"
    assert_same(model, *losses, 1e-10)


def test_a_batch_without_tokens_in_the_loss_gives_zero():
    model, batch = model_for("none", {}), batch_of()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    loss = sliced_loss(model, batch, 8)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_initial_gradients_are_those_of_whole_rows():
    """LoRA-GA initializes from them."""
    model, batches = lively_model(), [batch_of(seed=seed) for seed in range(2)]
    layers = ["blocks.0.att.key", "blocks.1.ffn.value"]
    sliced, whole = (mean_gradients(model, layers, batches, chunk) for chunk in (8, 0))
    for name in layers:
        assert relative_error(sliced[name], whole[name]) < 1e-5


# -------------------------------------------------------------------------------------------- memory


def peak_bytes(tokens: int, chunk: int, full: bool, grad_cp: bool = False) -> int:
    """Return the peak of a training step on one row, in addition to what existed before."""
    model, batch = model_for("bone", {"r": 16}, torch.float32, grad_cp=grad_cp), batch_of(tokens, rows=1)
    with LiveBytes() as live:
        sliced_loss(model, batch, chunk, full).backward()
    return live.peak


@pytest.mark.parametrize(("full", "grad_cp"), [(True, True), (False, False)])
def test_memory_is_that_of_one_slice_and_the_states(full, grad_cp):
    """Each additional slice adds only its state, its tokens and a few scalars."""
    few, many = (peak_bytes(32 * slices, 32, full, grad_cp) for slices in (2, 12))
    state = TINY.n_layer * (2 * TINY.n_embd + TINY.n_head * TINY.head_size**2) * 4
    tokens = 32 * (8 + 8 + 1)
    assert many - few < 10 * (1.05 * state + tokens + 200)
    whole = peak_bytes(32 * 12, 0, full, grad_cp)
    assert whole > few * (2 if grad_cp else 4), "a whole row needs much more, so the count works"
