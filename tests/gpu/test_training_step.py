"""One optimizer step of a tiny model in bf16 on a GPU, compared with float64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.sections import OptimConfig, PeftConfig
from rwkv_peft.model.init import model_from_state
from rwkv_peft.model.rwkv6 import RWKV6, TimeMix
from rwkv_peft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from rwkv_peft.training.optim.optimizer import build_optimizer
from tests.gpu.devices import assert_as_precise_as_plain, assert_rounded_once, each_backend, skip_without
from tests.helpers import TINY, lively_model, peft_section

ADAPTERS = {
    "bone": peft_section("bone", {"r": 16}),
    "lora": peft_section("lora", {"r": 4}),
    "none": PeftConfig(),
}


def bf16_model(peft: PeftConfig) -> RWKV6:
    """Return a model with large matrices in bf16, trainable parameters in fp32, and adapters that are not zero."""
    model = model_from_state(TINY, lively_model().state_dict(), "lively", dtype=torch.bfloat16)
    add_adapter(model, peft)
    torch.manual_seed(0)
    if not peft.method.trains_base:
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
    return model


def take_step(
    model: RWKV6, backend: str, ids: Tensor, mask: Tensor, fused: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return gradients and updates, each as one vector, and the loss before and after the step."""
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
def test_step_is_as_precise_as_the_plain_computation(device, backend, adapter):
    """The plain computation also uses bf16, with WKV6 one token at a time and the loss from all logits."""
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
    assert_as_precise_as_plain(found, plain, exact)
    assert_rounded_once(before, exact_loss, torch.bfloat16)
    assert after < before, "the step must lower the loss of its own batch"
