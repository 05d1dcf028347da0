"""Adapters on the head, through which the loss goes, and on the embedding, which is looked up and not multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops import cross_entropy
from rwkv_peft.ops.cross_entropy import masked_cross_entropy
from rwkv_peft.peft.injection import inject, peft_layers
from rwkv_peft.peft.registry import method_config
from tests.helpers import TINY, lively_model, peft_section, relative_error
from tests.peft import definitions
from tests.peft.cases import CASES
from tests.peft.definitions import (
    copies,
    goes_onto_embeddings,
    gradients_of,
    make_layer,
    make_linear,
    name_of,
    tokens,
    train_a_little,
    trained_of,
)


def on_20_blocks(method: str, options: dict) -> dict:
    """80 x 64, the head's and embedding's shape, has 20 blocks at r=16."""
    return options | {"g": options["g"] + options["g"] // 4} if "g" in options else options


@pytest.mark.parametrize(
    ("method", "options", "rows"), [*((*case, 7) for case in CASES), *((*CASES[0], rows) for rows in (5, 1000))]
)
def test_loss_through_a_head_with_an_adapter(method, options, rows, monkeypatch):
    """Value and gradients against the loss of all logits of the materialized head; rows without training left out."""
    monkeypatch.setattr(cross_entropy, "HEAD_ROWS", rows)
    options = on_20_blocks(method, options)
    base = make_linear((80, 64))
    head = make_layer(method, options, base).eval()
    start = copies(trained_of(head))
    train_a_little(head)
    model = lively_model()
    model.head = head
    torch.manual_seed(0)
    hidden = torch.randn(3, 9, 64, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(80, (3, 9)), torch.rand(3, 9) < 0.7
    assert 5 * 3 < mask.sum() < 27
    p = trained_of(head)
    logits = definitions.output(method, options, hidden, base.weight.detach(), None, p, start)
    fast, slow = model.loss(hidden, targets, mask), masked_cross_entropy(logits, targets, mask)
    assert relative_error(fast, slow) < 1e-12
    inputs = (hidden, *p.values())
    pairs = zip(torch.autograd.grad(fast * 3, inputs), torch.autograd.grad(slow * 3, inputs), strict=True)
    for name, (a, b) in zip(("hidden", *p), pairs, strict=True):
        assert relative_error(a, b) < 1e-12, name
        assert b.norm() > 0, name


def test_loss_of_nothing_through_a_head_with_an_adapter():
    model = lively_model()
    inject(model, method_config("lora", {"r": 4}), ("head",))
    hidden = torch.randn(2, 3, 64, requires_grad=True)
    loss = model.loss(hidden, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad.abs().max() == 0


def test_loss_of_bf16_through_a_head_with_an_adapter():
    """As near to float64 as the same loss through the plain matrix is."""
    torch.manual_seed(0)
    head = make_linear((80, 64), dtype=torch.bfloat16)
    model = lively_model()
    model.head = make_layer("lora", {"r": 4}, head, torch.float32)
    hidden, targets = torch.randn(2, 9, 64).bfloat16(), torch.randint(80, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    exact = masked_cross_entropy(hidden.double() @ head.weight.detach().double().T, targets, mask)
    assert model.loss(hidden, targets, mask).dtype == torch.float32
    assert float(model.loss(hidden, targets, mask).detach()) == pytest.approx(float(exact), rel=1e-2)


LOOKED_UP = [case for case in CASES if goes_onto_embeddings(case)]
MULTIPLIED = [case for case in CASES if case not in LOOKED_UP]


@pytest.mark.parametrize(("method", "options"), LOOKED_UP, ids=[name_of(case) for case in LOOKED_UP])
def test_embedding_with_an_adapter_equals_the_definition(method, options):
    """The rows of the materialized matrix, and their gradients; the base's own rows at init."""
    torch.manual_seed(0)
    base = nn.Embedding(80, 64, dtype=torch.float64)
    layer = make_layer(method, options, base)
    start = copies(trained_of(layer))
    ids = torch.tensor([[0, 79, 17, 17], [5, 16, 31, 2]])
    assert relative_error(layer(ids), base(ids)) < 1e-12
    train_a_little(layer)
    p = trained_of(layer)
    rows = layer(ids)
    exact = definitions.matrix(method, options, base.weight.detach(), p, start)
    assert relative_error(rows, exact[ids]) < 1e-12
    assert relative_error(rows, base(ids)) > 1e-2
    grad = torch.randn(2, 4, 64, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(rows, list(p.values()), grad),
        torch.autograd.grad(exact[ids], list(p.values()), grad),
        strict=True,
    )
    for name, (a, b) in zip(p, pairs, strict=True):
        assert relative_error(a, b) < 1e-12, name
        assert b.norm() > 0


@pytest.mark.parametrize(("method", "options"), MULTIPLIED, ids=[name_of(case) for case in MULTIPLIED])
def test_methods_that_cannot_go_onto_an_embedding_say_so(method, options):
    model = lively_model()
    peft = peft_section(method, on_20_blocks(method, options), peft_targets=("head", "emb"))
    with pytest.raises(
        ConfigError, match=r"--peft_targets emb: is an embedding, which this method or mode does not support"
    ):
        inject(model, peft.method, peft.peft_targets)
    assert peft_layers(model) == {}


@pytest.mark.parametrize(("method", "options"), LOOKED_UP, ids=[name_of(case) for case in LOOKED_UP])
def test_the_whole_model_with_embedding_and_head(method, options):
    """Equals a plain model that has the effective matrices."""
    model, plain = lively_model(), lively_model()
    peft = peft_section(method, options, peft_targets=("emb", "head", "ffn"))
    assert "emb" in inject(model, peft.method, peft.peft_targets, gradients=gradients_of(model))
    train_a_little(model, 0.05)
    with torch.no_grad():
        for name, layer in peft_layers(model).items():
            plain.get_submodule(name).weight.copy_(layer.effective_weight())
        assert relative_error(model.eval()(tokens())[0], plain(tokens())[0]) < 1e-5
        _, state = model(tokens())
        step = model.step(tokens()[:, :1], state)[0]
        _, state = plain(tokens())
        assert relative_error(step, plain.step(tokens()[:, :1], state)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_foreign_embedding_keeps_its_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(TINY.vocab_size, 64), nn.Linear(64, 32)).to(dtype)
    before = model(tokens())
    inject(model, method_config("bone", {"r": 16}), ("0",))
    assert torch.equal(model(tokens()), before)
