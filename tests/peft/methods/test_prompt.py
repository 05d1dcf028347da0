"""Prompt tuning: against a model whose vocabulary has the prompt's vectors as words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.errors import ConfigError
from rwkv_peft.inference.generate import generate
from rwkv_peft.model.init import model_from_state, model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from rwkv_peft.peft.injection import inject
from tests.helpers import TINY, lively_model, peft_section, relative_error, with_shape
from tests.peft.definitions import loss_and_gradients, tokens, train_a_little

COUNT = 5
PEFT = peft_section("prompt", {"tokens": COUNT})


def prompted_model(**options) -> RWKV6:
    model = lively_model(**options)
    add_adapter(model, PEFT)
    train_a_little(model)
    return model


def with_words(model: RWKV6) -> RWKV6:
    """The base with the prompt's vectors as words COUNT .. of a larger vocabulary, and no prompt."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "prompt"}
    state["emb.weight"] = torch.cat([state["emb.weight"], model.prompt.detach().to(state["emb.weight"].dtype)])
    state["head.weight"] = torch.cat([state["head.weight"], state["head.weight"][:COUNT]])
    return model_from_state(with_shape(vocab_size=TINY.vocab_size + COUNT), state, "words", dtype=model.dtype)


def with_words_before(ids: torch.Tensor) -> torch.Tensor:
    words = torch.arange(TINY.vocab_size, TINY.vocab_size + COUNT)
    return torch.cat([words.expand(len(ids), COUNT), ids], 1)


def double(model: RWKV6) -> RWKV6:
    model.dtype = torch.float64
    return model.double()


def test_equals_the_prompts_vectors_as_words_before_the_text():
    model = double(prompted_model())
    ids = tokens(batch=3)
    logits = with_words(model)(with_words_before(ids))[0][:, COUNT:, : TINY.vocab_size]
    assert relative_error(model(ids)[0], logits) < 1e-12
    assert relative_error(double(lively_model())(ids)[0], logits) > 1e-2


@pytest.mark.parametrize("grad_cp", [False, True])
def test_gradient_equals_that_of_the_words(grad_cp):
    """Summed over the batch; the loss is that of the text alone. Nothing else gets a gradient."""
    model = double(prompted_model(grad_cp=grad_cp))
    ids = tokens(batch=3)
    mask = torch.rand(3, ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) < 0.7
    loss, gradients = loss_and_gradients(model, ids, mask)
    assert set(gradients) == {"prompt"}
    words = with_words(model)
    for name, parameter in words.named_parameters():
        parameter.requires_grad_(name == "emb.weight")
    hidden = words.hidden(with_words_before(ids[:, :-1]))[0][:, COUNT:]
    vocabulary_loss = model.loss(hidden, ids[:, 1:], mask)
    (expected,) = torch.autograd.grad(vocabulary_loss, words.emb.weight)
    assert relative_error(loss, vocabulary_loss) < 1e-12
    assert relative_error(gradients["prompt"], expected[TINY.vocab_size :]) < 1e-10
    assert expected[TINY.vocab_size :].norm(dim=1).min() > 0, "every vector matters"


def test_a_text_in_parts_begins_with_the_prompt_once():
    model = double(prompted_model())
    ids = tokens(batch=2)
    whole, _ = model(ids)
    first, state = model(ids[:, :7])
    second, _ = model(ids[:, 7:], state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12


def test_generation_uses_it():
    model = double(prompted_model())
    start = tokens(batch=1, length=4)
    options = {"max_tokens": 12, "temperature": 0, "stop": -1}
    expected = with_words_before(start)[0].tolist()
    words = with_words(model)
    with torch.no_grad():
        for _ in range(12):  # from the beginning each time, without a state
            logits = words(torch.tensor([expected]))[0][0, -1, : TINY.vocab_size]
            expected.append(int(logits.argmax()))
    assert list(generate(model, start[0].tolist(), **options)) == expected[-12:]
    assert list(generate(double(lively_model()), start[0].tolist(), **options)) != expected[-12:]


def test_texts_of_a_batch_do_not_share_what_follows():
    """All texts start from the prompt's state, and each continues from its own."""
    model = double(prompted_model())
    ids = tokens(batch=2)
    _, state = model(ids)
    steps, _ = model.step(torch.tensor([[3], [4]]), state)
    for row in range(2):
        _, own = model(ids[row : row + 1])
        step, _ = model.step(torch.tensor([[3 + row]]), own)
        assert relative_error(steps[row], step[0]) < 1e-12
    assert torch.equal(model(ids)[0], model(ids)[0]), "using a state up leaves the prompt alone"


def test_starts_as_words_of_the_vocabulary():
    model = lively_model()
    torch.manual_seed(0)
    add_adapter(model, PEFT)
    assert model.prompt.shape == (COUNT, TINY.n_embd)
    same = (model.prompt[:, None] == model.emb.weight[None]).all(-1)  # (COUNT, V)
    assert same.any(1).all()
    assert len(same.int().argmax(1).unique()) > 1


@pytest.mark.parametrize(("adapter_dtype", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_of_what_trains(adapter_dtype, dtype):
    model = model_from_state(TINY, lively_model().state_dict(), "lively", dtype=torch.bfloat16)
    add_adapter(model, peft_section("prompt", adapter_dtype=adapter_dtype))
    assert model.prompt.dtype == dtype
    assert model(tokens())[0].dtype == torch.bfloat16


def test_on_meta_it_has_a_shape_only():
    model = model_on_meta(TINY)
    add_adapter(model, PEFT)
    assert model.prompt.shape == (COUNT, TINY.n_embd)


def test_a_foreign_module_has_no_place_for_it():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(
        ConfigError, match=r"--peft: this model does not support prompts; found prompt, expected a method with"
    ):
        inject(model, PEFT.method, PEFT.peft_targets)
    assert all(parameter.requires_grad for parameter in model.parameters())
