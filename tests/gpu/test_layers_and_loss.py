"""Bone and LoRA layers and the fused loss in bf16 on a GPU, compared with float64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_peft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from rwkv_peft.peft.base import PeftLinear
from rwkv_peft.peft.injection import inject
from rwkv_peft.peft.registry import method_config
from tests.gpu.devices import assert_as_precise_as_plain, assert_rounded_once, each_device

LAYERS = {
    "row": ("bone", {"r": 16, "mode": "row"}),
    "col": ("bone", {"r": 16, "mode": "col"}),
    "left": ("bone", {"r": 16, "mode": "left"}),
    "lora": ("lora", {"r": 4}),
}


def results(names, outputs: Tensor, inputs, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Return the output and the gradient of every input by name."""
    return dict(zip(("y", *names), (outputs.detach(), *torch.autograd.grad(outputs, inputs, grad)), strict=True))


def adapted_layer(method: str, options: dict) -> PeftLinear:
    """Return a bf16 layer of 96 x 64 with fp32 adapters that are not zero and exact in bf16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False, dtype=torch.bfloat16))
    inject(model, method_config(method, options), ("0",))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.bfloat16().float()
    return model[0]


@each_device
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_as_precise_as_the_plain_computation(device, name):
    """The plain computation is the product with W + dW, rounded to bf16, with gradients in bf16."""
    low = adapted_layer(*LAYERS[name])
    x, grad = torch.randn(2, 21, 64).bfloat16(), torch.randn(2, 21, 96).bfloat16()

    def run(layer: PeftLinear, x: Tensor, materialized: bool) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        weight = layer.effective_weight().to(x.dtype) if materialized else None
        y = layer(x) if weight is None else F.linear(x, weight)
        inputs = (x, *(getattr(layer, adapter) for adapter in layer.adapter_names))
        return results(("x", *layer.adapter_names), y, inputs, grad.to(y))

    exact = run(copy.deepcopy(low).double(), x.double(), materialized=True)
    plain = run(copy.deepcopy(low).bfloat16(), x, materialized=True)
    found = run(copy.deepcopy(low).to(device), x.to(device), materialized=False)
    assert found["y"].dtype == torch.bfloat16
    assert_as_precise_as_plain(found, plain, exact)


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_as_precise_as_the_plain_computation(device, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 37, 64).to(dtype), (torch.randn(500, 64) / 8).to(dtype)
    targets, mask = torch.randint(500, (3, 37)), torch.rand(3, 37) < 0.6

    def run(hidden: Tensor, weight: Tensor, fused: bool) -> dict[str, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        rest = targets.to(hidden.device), mask.to(hidden.device)
        loss = linear_cross_entropy(*leaves, *rest) if fused else masked_cross_entropy(leaves[0] @ leaves[1].T, *rest)
        return results(("hidden", "weight"), loss, leaves)

    exact = run(hidden.double(), weight.double(), fused=False)
    plain = run(hidden, weight, fused=False)
    found = run(hidden.to(device), weight.to(device), fused=True)
    assert found["y"].dtype == torch.float32
    assert_rounded_once(*(x.pop("y") for x in (found, exact)), dtype)
    del plain["y"]
    assert_as_precise_as_plain(found, plain, exact)
