"""Generation of token ids and of text."""

from __future__ import annotations

import pytest
import torch

from rwkv_peft.inference.generate import generate, sample_token
from tests.helpers import TINY, lively_model


def test_greedy_generation_equals_full_forward_passes():
    """Each token is the most likely one after all tokens before it, computed without a state."""
    model, ids = lively_model().eval(), [5, 7, 11]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert list(generate(model, ids[:3], max_tokens=6, temperature=0, stop=-1)) == ids[3:]
    assert list(generate(model, ids[:3], max_tokens=6, temperature=0, stop=ids[5])) == ids[3:5]


def test_a_step_is_a_forward_pass_that_updates_the_state_in_place():
    model, ids = lively_model().eval(), torch.tensor([[5, 7, 11, 2]])
    with torch.no_grad():
        expected, after = model(ids)
        _, state = model(ids[:, :3])
    memory = [layer.wkv.data_ptr() for layer in state]
    logits, state = model.step(ids[:, 3:], state)
    torch.testing.assert_close(logits[:, -1], expected[:, -1])
    for layer, other in zip(state, after, strict=True):
        torch.testing.assert_close(vars(layer), vars(other))
    assert [layer.wkv.data_ptr() for layer in state] == memory


def test_generation_is_reproducible_with_a_seed():
    model = lively_model().eval()
    runs = [list(generate(model, [1], max_tokens=20, top_p=1.0, seed=seed, stop=-1)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert all(0 <= token < TINY.vocab_size for token in runs[2])


@pytest.mark.parametrize(("top_p", "allowed"), [(0.0, {2}), (0.5, {2}), (0.7, {2, 0}), (1.0, {0, 1, 2})])
def test_top_p_keeps_the_most_likely_tokens(top_p, allowed):
    logits = torch.tensor([0.3, 0.1, 0.6]).log()
    generator = torch.Generator().manual_seed(0)
    assert {sample_token(logits, 1.0, top_p, generator) for _ in range(200)} == allowed
