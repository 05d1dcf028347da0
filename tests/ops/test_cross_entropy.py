"""The loss: its definition compared with RWKV-LM's, and the fused form compared with the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rwkv_peft.ops import cross_entropy
from rwkv_peft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from tests.helpers import relative_error


def rwkv_lm_loss(logits, targets, mask):
    """Return RWKV-LM's masked loss and its gradient with L2Wrap, over the tokens in the loss."""
    loss = (
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") * mask.flatten()
    ).sum() / mask.sum()
    (grad,) = torch.autograd.grad(loss, logits)
    largest, ids = logits.detach().max(-1, keepdim=True)
    pull = torch.zeros_like(logits).scatter_(-1, ids, largest * 1e-4 / mask.sum()) * mask.unsqueeze(-1)
    return loss.detach(), grad + pull


def test_loss_and_gradient_follow_rwkv_lm():
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 7, 11, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(11, (3, 7))
    mask = torch.rand(3, 7) < 0.6
    loss = masked_cross_entropy(logits, targets, mask)
    (grad,) = torch.autograd.grad(loss, logits)
    expected_loss, expected_grad = rwkv_lm_loss(logits, targets, mask)
    assert relative_error(loss, expected_loss) < 1e-14
    assert relative_error(grad, expected_grad) < 1e-12
    assert grad[~mask].abs().max() == 0, "tokens outside the mask have no gradient"


def test_loss_without_tokens_is_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_loss_of_bf16_logits_is_computed_in_fp32():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 50).bfloat16()
    targets, mask = torch.randint(50, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    loss = masked_cross_entropy(logits, targets, mask)
    assert loss.dtype == torch.float32
    assert relative_error(loss, F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())) < 1e-6


def head_inputs(dtype=torch.float64, *, rows=(3, 7), width=6, vocabulary=11, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(*rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, rows), torch.rand(rows) < 0.6


@pytest.mark.parametrize("chunk_logits", [1, 25, 10**6])
def test_fused_equals_the_definition(chunk_logits, monkeypatch):
    """The loss and both gradients, computed for one row, two rows and all rows at a time."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_logits)
    hidden, weight, targets, mask = head_inputs()
    fused = linear_cross_entropy(hidden, weight, targets, mask)
    plain = masked_cross_entropy(hidden @ weight.T, targets, mask)
    assert relative_error(fused, plain) < 1e-14
    grads = zip(
        torch.autograd.grad(3 * fused, (hidden, weight)), torch.autograd.grad(3 * plain, (hidden, weight)), strict=True
    )
    assert all(relative_error(a, b) < 1e-12 for a, b in grads)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_fused_with_frozen_inputs(frozen):
    hidden, weight, targets, mask = head_inputs()
    plain = torch.autograd.grad(masked_cross_entropy(hidden @ weight.T, targets, mask), (hidden, weight))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets, mask)
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    trained, expected = (hidden, plain[0]) if frozen == "weight" else (weight, plain[1])
    assert relative_error(trained.grad, expected) < 1e-12


def test_fused_loss_without_tokens_is_zero():
    hidden, weight, targets, mask = head_inputs()
    loss = linear_cross_entropy(hidden, weight, targets, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_fused_in_bf16_is_as_precise_as_unfused():
    """Compared with float64 for the same bf16 inputs and an fp32 weight, the error is at most twice the unfused one."""
    hidden, weight, targets, mask = head_inputs(torch.float32, rows=(4, 16), width=64, vocabulary=200)
    low = hidden.detach().bfloat16().requires_grad_()
    exact_hidden = low.detach().double().requires_grad_()
    exact_weight = weight.detach().bfloat16().double()
    exact = masked_cross_entropy(exact_hidden @ exact_weight.T, targets, mask)
    fused = linear_cross_entropy(low, weight, targets, mask)
    plain = masked_cross_entropy(low @ weight.bfloat16().T, targets, mask)
    (exact_grad,) = torch.autograd.grad(exact, exact_hidden)
    (fused_grad,) = torch.autograd.grad(fused, low, retain_graph=True)
    (plain_grad,) = torch.autograd.grad(plain, low)
    assert fused.dtype == torch.float32
    assert relative_error(fused_grad, exact_grad) < 2 * relative_error(plain_grad, exact_grad)
    assert relative_error(fused, exact) < 2 * relative_error(plain, exact) + 1e-6
    assert torch.autograd.grad(fused, weight)[0].dtype == torch.float32


def test_large_logits_do_not_overflow():
    hidden, weight, targets, mask = head_inputs(torch.float32)
    loss = linear_cross_entropy(1e4 * hidden, weight, targets, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
