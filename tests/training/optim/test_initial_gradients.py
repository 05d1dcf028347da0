"""LoRA-GA's initialization: the base's gradients on the first samples, and the factors computed from them."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv_peft.adapted_model import load_with_adapter
from rwkv_peft.base_model import load_base
from rwkv_peft.ops.cross_entropy import masked_cross_entropy
from rwkv_peft.training.optim.initial_gradients import mean_gradients
from tests.helpers import TINY, lively_model, relative_error
from tests.peft.definitions import make_layer, make_linear
from tests.training.small_runs import train, write_inputs


def batches(count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(TINY.vocab_size, (2, 9), generator=generator),
            "targets": torch.randint(TINY.vocab_size, (2, 9), generator=generator),
            "loss_mask": torch.rand(2, 9, generator=generator) < 0.7,
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("grad_cp", [False, True])
def test_mean_gradients_are_autograds(grad_cp):
    """Of linear layers, head and embedding; the mean over all trained tokens of batches that have unequal counts."""
    names = ["emb", "blocks.0.att.key", "blocks.1.ffn.value", "head"]
    model = lively_model(grad_cp=grad_cp)
    model.blocks[0].requires_grad_(False)
    marked = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = mean_gradients(model, names, batches())
    exact = lively_model().double()
    exact.dtype = torch.float64
    weights = [exact.get_submodule(name).weight for name in names]
    whole = {key: torch.cat([batch[key] for batch in batches()]) for key in batches()[0]}
    loss = masked_cross_entropy(exact(whole["input_ids"])[0], whole["targets"], whole["loss_mask"])
    expected = torch.autograd.grad(loss, weights)
    assert set(found) == set(names)
    for name, gradient in zip(names, expected, strict=True):
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], gradient) < 1e-4, name
    assert {name: p.requires_grad for name, p in model.named_parameters()} == marked, "the marks are restored"
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def spectrum(shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """U, S, V of a gradient whose singular values fall by a third each."""
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))[0]
    return u, 3.0 ** -torch.arange(min(shape), dtype=torch.float64), v


@pytest.mark.parametrize("shape", [(96, 64), (64, 224)])
def test_the_first_step_goes_along_the_gradient(shape, monkeypatch):
    """A spans the r largest right singular vectors, B the next r left ones, both of length O^(1/4) / sqrt(gamma).

    So the first step, dB = -G A^T and dA = -B^T G, changes W by the best approximation of G of rank 2r (paper, 3.3).
    """
    r, gamma = 4, 16.0
    u, s, v = spectrum(shape)
    gradient = u * s @ v.T
    base = make_linear(shape)
    monkeypatch.setattr("tests.peft.definitions.gradient_like", lambda weight: gradient)
    layer = make_layer("lora_ga", {"r": r, "alpha": 8.0, "gamma": gamma}, base)
    squared = shape[0] ** 0.5 / gamma  # of the vectors' length
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    assert relative_error(a.T @ a, squared * v[:, :r] @ v[:, :r].T) < 1e-6
    assert relative_error(b @ b.T, squared * u[:, r : 2 * r] @ u[:, r : 2 * r].T) < 1e-6
    scaling = 8.0 / r**0.5
    y = layer(torch.eye(shape[1], dtype=torch.float64)).T  # the effective matrix
    grad_a, grad_b = torch.autograd.grad((y * gradient).sum(), (layer.lora_A, layer.lora_B))
    step = scaling * (grad_b @ a + b @ grad_a)
    best = (u * s)[:, : 2 * r] @ v[:, : 2 * r].T
    assert relative_error(step / (scaling**2 * squared), best) < 1e-6


def test_a_run_starts_from_its_first_samples(tmp_path):
    """The adapter file has the initial factors; they are those of the gradients on the data, and W is never written."""
    inputs = write_inputs(tmp_path)
    before = load_base(inputs[1])
    options = json.dumps({"r": 4, "samples": 4})
    rows = train(tmp_path / "run", inputs, "--peft", "lora_ga", "--lora_ga_config", options)
    plain = train(tmp_path / "plain", inputs, "--peft", "lora", "--lora_config", '{"r":4}')
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4), "the identity at init"
    assert rows[-1]["loss"] < rows[0]["loss"]
    loaded = load_with_adapter(inputs[1], tmp_path / "run" / "rwkv-0.safetensors")
    layer = loaded.model.blocks[0].ffn.key
    moved = relative_error(layer.lora_A, layer.init_lora_A)
    assert 0 < moved < 1
    a = layer.init_lora_A
    assert relative_error(a @ a.T, 128**0.5 / 16 * torch.eye(4)) < 1e-4
    options = json.dumps({"r": 4, "samples": 6})
    train(tmp_path / "other", inputs, "--peft", "lora_ga", "--lora_ga_config", options)
    other = load_with_adapter(inputs[1], tmp_path / "other" / "rwkv-0.safetensors").model.blocks[0].ffn.key
    assert relative_error(other.init_lora_A, a) > 1e-3, "more samples give another gradient"
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_base(inputs[1]).items())


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_the_first_step_moves_b_by_its_own_rate(method, tmp_path):
    """LoRA+ in a run: Adam's first step is the learning rate, whatever the gradient."""
    inputs = write_inputs(tmp_path)
    options = {"r": 4, "lr_ratio": 16}
    flags = ["--peft", method, f"--{method}_config", json.dumps(options), "--epoch_steps", "1"]
    train(tmp_path / "run", inputs, *flags, "--lr_init", "1e-4", "--lr_final", "1e-4")
    layers = load_with_adapter(inputs[1], tmp_path / "run" / "rwkv-0.safetensors").model.blocks[0].att
    b = layers.key.lora_B.detach()
    start_b = getattr(layers.key, "init_lora_B", torch.zeros_like(b))
    assert float((b - start_b).abs().median()) == pytest.approx(16e-4, rel=1e-2)
    if method == "pissa":
        moved = (layers.key.lora_A - layers.key.init_lora_A).abs().median()
        assert float(moved) == pytest.approx(1e-4, rel=1e-2)
    if method == "dora":
        moved = (layers.key.lora_magnitude - layers.key.weight.norm(dim=1)).abs().median()
        assert float(moved) == pytest.approx(1e-4, rel=1e-2)
