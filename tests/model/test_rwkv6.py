"""The model compared with the `rwkv` package, an independent implementation, and with itself."""

from __future__ import annotations

import os

import pytest
import torch

from rwkv_peft.base_model import load_base, shape_of
from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.model.init import model_from_scratch, model_from_state, model_on_meta
from rwkv_peft.model.rwkv6 import RWKV6
from tests.helpers import TINY, lively_model, relative_error, with_shape, write_base

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLIC_KEYS = """
ln1.weight ln1.bias ln2.weight ln2.bias ln0.weight ln0.bias
att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r att.time_maa_g
att.time_maa_w1 att.time_maa_w2 att.time_decay att.time_decay_w1 att.time_decay_w2 att.time_faaaa
att.receptance.weight att.key.weight att.value.weight att.output.weight att.gate.weight
att.ln_x.weight att.ln_x.bias ffn.time_maa_k ffn.time_maa_r
ffn.key.weight ffn.receptance.weight ffn.value.weight
""".split()


def test_keys_and_their_order_are_those_of_rwkv_lm():
    blocks = [
        f"blocks.{layer}.{key}" for layer in range(2) for key in PUBLIC_KEYS if layer == 0 or not key.startswith("ln0")
    ]
    expected = ["emb.weight", *blocks, "ln_out.weight", "ln_out.bias", "head.weight"]
    assert list(model_on_meta(TINY).state_dict()) == expected


def test_public_shapes_of_the_1b6_model():
    shapes = {
        key: tuple(t.shape)
        for key, t in model_on_meta(ModelConfig(n_layer=24, n_embd=2048).resolved()).state_dict().items()
    }
    assert shapes["blocks.3.att.time_maa_w1"] == (2048, 160)
    assert shapes["blocks.3.att.time_maa_w2"] == (5, 32, 2048)
    assert shapes["blocks.3.att.time_decay_w2"] == (64, 2048)
    assert shapes["blocks.3.att.time_faaaa"] == (32, 64)
    assert shapes["blocks.3.ffn.key.weight"] == (7168, 2048)
    assert shapes["blocks.3.att.time_maa_x"] == (1, 1, 2048)
    assert shapes["head.weight"] == (65536, 2048)


def client_logits(path, ids: list[int], *, one_by_one: bool) -> torch.Tensor:
    """Return the logits (T, V) of the `rwkv` package for the same file."""
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_CUDA_ON"] = "0"
    from rwkv.model import RWKV

    client = RWKV(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)
    if not one_by_one:
        return client.forward(ids, None, full_output=True)[0]
    rows, state = [], None
    for token in ids:
        logits, state = client.forward([token], state)
        rows.append(logits)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("config", "one_by_one"),
    [
        (TINY, False),
        (with_shape(head_size=64), True),
        (with_shape(n_embd=96, dim_att=96, head_size=16, dim_ffn=160), True),
    ],
    ids=["head 32, batch", "head 64, token by token", "head 16, token by token"],
)
def test_logits_equal_the_rwkv_package(config, one_by_one, tmp_path):
    path = write_base(tmp_path / "base.pth", config)
    ids = torch.randint(config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(3))
    state = load_base(path)
    model = model_from_state(shape_of(state, path), state, path)
    with torch.no_grad():
        if one_by_one:
            rows, carried = [], None
            for t in range(ids.shape[1]):
                logits, carried = model(ids[:, t : t + 1], carried)
                rows.append(logits)
            ours = torch.cat(rows, dim=1)
        else:
            ours = model(ids)[0]
    for row in range(2):
        theirs = client_logits(path, ids[row].tolist(), one_by_one=one_by_one)
        assert theirs.abs().max() > 1, "logits near zero would not show a difference"
        assert (ours[row] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("cut", [1, 32])
def test_carried_state_equals_one_pass(cut):
    model = lively_model().double()
    model.dtype = torch.float64
    ids = torch.randint(TINY.vocab_size, (3, 41))
    whole, end = model(ids)
    first, state = model(ids[:, :cut])
    second, end_of_second = model(ids[:, cut:], state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    for a, b in zip(end, end_of_second, strict=True):
        assert relative_error(a.wkv, b.wkv) < 1e-12
        assert relative_error(a.att_shift, b.att_shift) < 1e-12
        assert relative_error(a.ffn_shift, b.ffn_shift) < 1e-12


def gradients(model: RWKV6, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_checkpointed_blocks_give_the_same_gradients():
    """Also with a frozen embedding, for which reentrant checkpointing gives wrong gradients without an error."""
    ids = torch.randint(TINY.vocab_size, (2, 19))
    plain = lively_model()
    plain.emb.weight.requires_grad_(False)
    saving = lively_model(grad_cp=True)
    saving.emb.weight.requires_grad_(False)
    for model in (plain, saving):
        model.zero_grad()
        model(ids)[0].square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            assert relative_error(b.grad, a.grad) < 1e-6, name


def test_every_parameter_has_a_gradient():
    found = gradients(lively_model(), torch.randint(TINY.vocab_size, (2, 9)))
    assert all(grad.abs().sum() > 0 for grad in found.values())


def test_bf16_follows_fp32():
    ids = torch.randint(TINY.vocab_size, (2, 33))
    exact = lively_model()
    state = exact.state_dict()
    rough = model_from_state(TINY, state, "base", dtype=torch.bfloat16)
    assert rough.head.weight.dtype == torch.bfloat16
    assert rough.blocks[0].att.time_decay.dtype == torch.float32
    assert rough(ids)[0].dtype == torch.bfloat16
    assert relative_error(rough(ids)[0], exact(ids)[0]) < 3e-2


def test_the_decay_is_fp32_under_bf16():
    """bf16 is not precise enough for a channel that remembers thousands of tokens."""
    att = model_from_state(TINY, lively_model().state_dict(), "base", dtype=torch.bfloat16).blocks[0].att
    w = att._decay(torch.randn(1, 5, 64).bfloat16())
    assert w.dtype == torch.float32
    assert not torch.equal(w, w.bfloat16().float())


def test_init_follows_rwkv_lm():
    """Some values of RWKV-LM's rules, computed by hand."""
    model = model_from_scratch(with_shape(n_layer=3, n_embd=64, head_size=32), seed=1)
    first, last = model.blocks[0].att, model.blocks[2].att
    assert torch.allclose(first.time_maa_x.flatten()[:3], 1 - torch.arange(3) / 64)
    assert torch.allclose(last.time_maa_v.flatten()[32], torch.tensor(1 - (0.5 ** (1 / 3) + 0.3)))
    assert torch.allclose(first.time_decay.flatten()[[0, 63]], torch.tensor([-6.0, -1.0]))
    assert torch.allclose(last.time_decay.flatten()[21], torch.tensor(-6 + 5 * (1 / 3) ** 2.0))
    assert torch.allclose(last.time_faaaa.flatten()[:3], torch.tensor([1.0, 62 / 63 + 0.1, 61 / 63 - 0.1]))
    assert torch.allclose(last.ln_x.weight, torch.ones(64))
    assert torch.allclose(first.ln_x.weight, torch.full((64,), (1 / 3) ** 0.7))
    assert first.output.weight.abs().max() == 0
    assert model.blocks[1].ffn.value.weight.abs().max() == 0
    assert first.time_maa_w1.abs().max() == 0
    assert 0 < first.time_maa_w2.abs().max() <= 0.01
    assert 0 < model.emb.weight.abs().max() <= 1e-4
    assert torch.allclose(first.key.weight @ first.key.weight.T, 0.01 * torch.eye(64), atol=1e-6)
    gain = 0.5 * (80 / 64) ** 0.5
    assert torch.allclose(model.head.weight.T @ model.head.weight, gain**2 * torch.eye(64), atol=1e-5)
    again = model_from_scratch(with_shape(n_layer=3, n_embd=64, head_size=32), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
