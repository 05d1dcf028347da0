"""Rows of several documents give the same loss, gradients and states as each document in a separate row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.model.init import model_from_state
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.methods.prompt import PromptConfig, add_prompt
from rwkv_peft.training.optim.initial_gradients import mean_gradients
from rwkv_peft.training.sliced_loss import sliced_loss
from tests.helpers import TINY, lively_model, peft_section, relative_error

LENGTHS = ([7, 1, 1, 23, 8, 30, 16], [33, 2, 16, 34, 1])
"""Tokens of each document in two rows of 86 tokens. Documents end inside and at the edges of chunks of 8 and 16 tokens.
Some have one token: two adjacent ones, and the last of a row."""
BACKENDS = ("native", "torch", "reference")
MIDDLE = slice(32, 40)
"""The document of 8 tokens in row 0."""


pytestmark = pytest.mark.usefixtures("one_thread")
"""The error bounds hold for one order of summation."""


def documents(row: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + row)
    return [torch.randint(TINY.vocab_size, (n,), generator=generator) for n in LENGTHS[row]]


def packed(seed: int = 0) -> dict[str, Tensor]:
    """Return a batch as from the data module: the target of a document's last token is not in the loss."""
    ids = torch.stack([torch.cat(documents(row, seed)) for row in range(2)])
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, lengths in enumerate(LENGTHS):
        starts[row, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    last = torch.cat((starts[:, 1:], torch.ones(2, 1, dtype=torch.bool)), dim=1)
    return {"input_ids": ids, "targets": ids.roll(-1, 1), "loss_mask": ~last, "starts": starts}


def model_for(method: str = "none", backend: str = "auto", dtype=torch.float32, **options) -> RWKV6:
    """Return a model whose adapter has been changed from its initial value."""
    model = model_from_state(TINY, lively_model().state_dict(), "lively", wkv_backend=backend, **options)
    if method != "none":
        torch.manual_seed(0)  # for adapter factors with random initial values
        peft_config = {"bone": {"r": 16}, "lora": {"r": 4}}[method]
        add_adapter(model, peft_section(method, peft_config))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape, generator=generator)
    if dtype == torch.float64:
        model.double()
    model.dtype = dtype
    return model


def gradients(model: RWKV6, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def packed_loss(model: RWKV6) -> Tensor:
    rows = packed()
    hidden, _ = model.hidden(rows["input_ids"], starts=rows["starts"])
    return model.loss(hidden, rows["targets"], rows["loss_mask"])


def loss_one_by_one(model: RWKV6) -> Tensor:
    """Return the mean over all tokens in the loss, computed from the mean of each document."""
    total, count = 0.0, 0
    for ids in documents(0) + documents(1):
        if len(ids) > 1:
            hidden, _ = model.hidden(ids[None, :-1])
            mask = torch.ones(1, len(ids) - 1, dtype=torch.bool)
            total = total + model.loss(hidden, ids[None, 1:], mask) * (len(ids) - 1)
            count += len(ids) - 1
    return total / count


def assert_same_as_alone(model, loss_limit: float, gradient_limit: float) -> None:
    """Check that packed rows have the loss and gradients of separate documents, within relative errors."""
    found, expected = packed_loss(model), loss_one_by_one(model)
    assert relative_error(found, expected) < loss_limit
    alone = gradients(model, expected)
    for name, grad in gradients(model, found).items():
        assert alone[name].abs().max() > 0, name
        assert relative_error(grad, alone[name]) < gradient_limit, name


@pytest.mark.parametrize(
    ("method", "backend", "grad_cp"),
    [
        ("none", "native", False),
        ("bone", "native", True),
        ("lora", "torch", False),
        ("none", "torch", True),
        ("bone", "reference", False),
    ],
)
def test_loss_and_gradients_equal_each_document_alone(method, backend, grad_cp):
    assert_same_as_alone(model_for(method, backend, grad_cp=grad_cp), 1e-6, 5e-6)


@pytest.mark.parametrize(("method", "backend"), [("none", "reference"), ("bone", "torch")])
def test_the_same_in_float64(method, backend):
    """float64 shows errors that rounding could hide."""
    assert_same_as_alone(model_for(method, backend, torch.float64), 1e-12, 1e-12)


@pytest.mark.parametrize(("method", "backend"), [("none", "native"), ("bone", "native"), ("lora", "torch")])
def test_the_same_in_bf16(method, backend):
    """The sums are rounded differently. The largest measured error is 3e-2, for time_faaaa."""
    assert_same_as_alone(model_for(method, backend, torch.bfloat16), 1e-3, 5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_is_the_last_documents(backend):
    model, rows = model_for(backend=backend), packed()
    _, state = model.hidden(rows["input_ids"], starts=rows["starts"])
    for row in range(2):
        _, alone = model.hidden(documents(row)[-1][None])
        for found, expected in zip(state, alone, strict=True):
            for name in ("att_shift", "wkv", "ffn_shift"):
                assert relative_error(getattr(found, name)[row], getattr(expected, name)[0]) < 2e-6, name


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.float32), ("native", torch.bfloat16), ("torch", torch.float32)]
)
def test_other_documents_change_no_bit(backend, dtype):
    """A document's outputs do not depend on other documents, and its loss does not train their tokens."""
    model, rows, others = model_for(backend=backend, dtype=dtype), packed(), packed(seed=1)
    before, _ = model.hidden(rows["input_ids"], starts=rows["starts"])
    ids = others["input_ids"].clone()
    ids[0, MIDDLE] = rows["input_ids"][0, MIDDLE]
    after, _ = model.hidden(ids, starts=rows["starts"])
    assert torch.equal(before[0, MIDDLE], after[0, MIDDLE])
    assert not torch.equal(before[0, 31], after[0, 31])
    inside = MIDDLE.stop - MIDDLE.start - 1  # the last token's output is different without packing
    (grad,) = torch.autograd.grad(before[0, MIDDLE][:inside].float().square().sum(), model.emb.weight)
    trained = set(grad.abs().sum(1).nonzero().flatten().tolist())
    assert trained == set(rows["input_ids"][0, MIDDLE][:inside].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_is_used_if_no_document_starts(backend):
    """Row 0 continues a text and row 1 starts one, so no gradient reaches the state of row 1."""
    model = model_for(backend=backend)
    ids = torch.randint(TINY.vocab_size, (2, 41), generator=torch.Generator().manual_seed(7))
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[1, 0] = True
    _, state = model.hidden(ids[:, :17])
    for layer in state:
        for tensor in (layer.att_shift, layer.wkv, layer.ffn_shift):
            tensor.retain_grad()
    found, _ = model.hidden(ids[:, 17:], state, starts)
    whole, _ = model.hidden(ids[:1])
    alone, _ = model.hidden(ids[1:, 17:])
    assert relative_error(found[0], whole[0, 17:]) < 2e-6
    assert relative_error(found[1], alone[0]) < 2e-6
    found.square().sum().backward()
    for layer in state:
        for tensor in (layer.att_shift, layer.wkv, layer.ffn_shift):
            assert tensor.grad[0].abs().max() > 0
            assert tensor.grad[1].abs().max() == 0


def test_a_row_without_starts_equals_the_model_without_starts():
    model, ids = model_for(), packed()["input_ids"]
    plain, _ = model.hidden(ids)
    for first in (False, True):
        starts = torch.zeros(ids.shape, dtype=torch.bool)
        starts[:, 0] = first
        assert torch.equal(model.hidden(ids, starts=starts)[0], plain)


def test_training_reads_starts_from_the_batch():
    model, rows = model_for(), packed()
    joined = {name: rows[name] for name in ("input_ids", "targets", "loss_mask")}
    assert torch.equal(sliced_loss(model, rows, 0), packed_loss(model))
    assert not torch.equal(sliced_loss(model, joined, 0), packed_loss(model))
    expected = gradients(model, loss_one_by_one(model))["head.weight"]
    assert relative_error(mean_gradients(model, ["head"], [rows])["head"], expected) < 5e-6


def test_a_prompt_is_rejected_in_a_packed_row():
    model, rows = model_for(), packed()
    add_prompt(model, PromptConfig(tokens=3), torch.float32, initialize=True)
    with pytest.raises(ValueError, match="a tuned prompt cannot be used with several texts"):
        model.hidden(rows["input_ids"], starts=rows["starts"])


def test_starts_of_another_shape_or_dtype_are_rejected():
    model, rows = model_for(), packed()
    for wrong in (rows["starts"][:, 1:], rows["starts"].long()):
        with pytest.raises(ValueError, match=r"starts must be bool \(2, 86\)"):
            model.hidden(rows["input_ids"], starts=wrong)
