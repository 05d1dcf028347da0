"""One optimizer step of a tiny model in bf16 on a GPU, against float64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.sections import OptimConfig, PeftConfig
from rwkv_peft.model.init import model_from_state
from rwkv_peft.model.rwkv6 import RWKV6, TimeMix
from rwkv_peft.ops.cross_entropy import linear_cross_entropy
from rwkv_peft.ops.wkv6.reference import masked_cross_entropy
from rwkv_peft.training.optim.optimizer import build_optimizer
from tests.gpu.devices import assert_as_good_as_plain, assert_rounded_once, each_backend, skip_without
from tests.helpers import TINY, lively_model

ADAPTERS = {
    "bone": PeftConfig(peft="bone", peft_config={"r": 16}),
    "lora": PeftConfig(peft="lora", peft_config={"r": 4}),
    "none": PeftConfig(),
}


def bf16_model(peft: PeftConfig) -> RWKV6:
    """Large matrices in bf16, what trains in fp32, adapters not zero."""
    model = model_from_state(TINY, lively_model().state_dict(), "lively", dtype=torch.bfloat16)
    add_adapter(model, peft)
    torch.manual_seed(0)
    if peft.peft != "none":
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
    return model


def take_step(
    model: RWKV6, backend: str, ids: Tensor, mask: Tensor, fused: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients and updates as one vector each; the loss before the step, and after it."""
    for module in model.modules():
        if isinstance(module, TimeMix):
            module.wkv_backend = backend

    def loss() -> Tensor:
        if fused:
            return linear_cross_entropy(model.hidden(ids[:, :-1])[0], model.head.weight, ids[:, 1:], mask)
        return masked_cross_entropy(model(ids[:, :-1])[0], ids[:, 1:], mask)

    optimizer = build_optimizer(model, OptimConfig(lr_init=1e-3))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    first = loss()
    first.backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {
        "gradient": torch.cat([p.grad.flatten() for p in trained]),
        "update": torch.cat([(p.detach() - b).flatten() for p, b in zip(trained, before, strict=True)]),
    }
    with torch.no_grad():
        return found, first, loss()


@each_backend("native", "torch", cuda=("native", "torch", "fla"))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_step_is_as_good_as_the_plain_computation(device, backend, adapter):
    """Plain: bf16 too, WKV6 one token at a time, the loss from all logits."""
    skip_without(backend, device)
    low = bf16_model(ADAPTERS[adapter])
    ids = torch.randint(TINY.vocab_size, (3, 72), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 71, dtype=torch.bool)
    mask[0, 40:] = False
    wide = copy.deepcopy(low).double()
    wide.dtype = torch.float64
    exact, exact_loss, _ = take_step(wide, "reference", ids, mask, fused=False)
    plain, *_ = take_step(copy.deepcopy(low), "reference", ids, mask, fused=False)
    found, before, after = take_step(low.to(device), backend, ids.to(device), mask.to(device), fused=True)
    assert_as_good_as_plain(found, plain, exact)
    assert_rounded_once(before, exact_loss, torch.bfloat16)
    assert after < before, "the step must lower the loss of its own batch"
