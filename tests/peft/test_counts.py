"""Count trainable parameters: compare with the papers and with each method's formula. Models are on meta."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rwkv_peft.adapted_model import add_adapter
from rwkv_peft.config.sections import ModelConfig
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.peft import inject
from rwkv_peft.peft.registry import method_config
from tests.helpers import TINY, peft_section
from tests.peft.llama import SMALL, TARGETS


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@functools.cache
def llama(small=False):
    """LLaMA-2-7B, or the small one, on meta."""
    shape = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    with torch.device("meta"):
        return LlamaForCausalLM(SMALL if small else LlamaConfig(**shape))


def trained_on_llama(method, options, small=False):
    model = copy.deepcopy(llama(small))
    inject(model, method_config(method, options), TARGETS)
    assert all(p.is_meta for p in model.parameters())
    return trained(model)


# The paper's Table 2: trainable parameters at r=64, and LoRA r=32 the same.
@pytest.mark.parametrize(
    ("method", "options"),
    [("bone", {"r": 64}), ("bone", {"r": 64, "mode": "col"}), ("bone", {"r": 64, "mode": "left"}), ("lora", {"r": 32})],
)
def test_trainable_parameters_are_the_papers(method, options):
    for n_layer, n_embd, count in ((24, 2048, 33_030_144), (32, 2560, 55_050_240), (32, 4096, 88_080_384)):
        model = model_on_meta(ModelConfig(n_layer=n_layer, n_embd=n_embd).resolved())
        add_adapter(model, peft_section(method, options))
        assert trained(model) == count


# LLaMA-2-7B: LoRA r=36 and col r=64, col for each r, and row and the unconstrained ablation (72.8M in the paper).
@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("lora", {"r": 36}, 89_948_160),
        ("bone", {"r": 64, "mode": "row"}, 72_876_032),
        ("bone", {"r": 32, "mode": "unconstrained"}, 72_876_032),
        ("bone", {"r": 16, "mode": "col"}, 21_757_952),
        ("bone", {"r": 32, "mode": "col"}, 43_515_904),
        ("bone", {"r": 64, "mode": "col"}, 87_031_808),
        ("bone", {"r": 128, "mode": "col"}, 174_063_616),
    ],
)
def test_llama_2_7b(method, options, count):
    assert trained_on_llama(method, options) == count


# (out, in) of the small LLaMA's targets, one layer of two: q k v o, gate up down.
SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
R = 8
LORA = sum(R * (o + i) for o, i in SHAPES)
FORMULAS = {
    "lora": ("lora", {}, LORA),
    "pissa": ("pissa", {}, LORA),
    "olora": ("olora", {}, LORA),
    "lora_ga": ("lora_ga", {}, LORA),
    "dora": ("dora", {}, LORA + sum(o for o, _ in SHAPES)),
    "miss": ("miss", {}, sum(R * o for o, _ in SHAPES)),
    "adapter": ("adapter", {}, sum(R * o + R + o * R + o for o, _ in SHAPES)),
    "row": ("bone", {"mode": "row"}, sum(i // R * R**2 for _, i in SHAPES)),
    "col": ("bone", {"mode": "col"}, sum(o // R * R**2 for o, _ in SHAPES)),
    "left": ("bone", {"mode": "left"}, sum(o // R * R**2 for o, _ in SHAPES)),
    "hadamard": ("bone", {"mode": "hadamard"}, sum(i // R * R**2 for _, i in SHAPES)),
    "unconstrained": ("bone", {"mode": "unconstrained"}, sum(2 * (i // R) * R**2 for _, i in SHAPES)),
    "group": ("bone", {"mode": "group", "g": 16}, len(SHAPES) * 16 * R**2),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_count_follows_from_the_shapes(case):
    method, options, in_one_layer = FORMULAS[case]
    assert trained_on_llama(method, {"r": R} | options, small=True) == 2 * in_one_layer


def test_a_prompt_is_its_tokens():
    model = model_on_meta(TINY)
    add_adapter(model, peft_section("prompt", {"tokens": 5}))
    assert trained(model) == 5 * TINY.n_embd


def test_an_adapter_on_rwkv_follows_the_two_output_projections():
    model = model_on_meta(TINY)
    targets = add_adapter(model, peft_section("adapter", {"r": 4}))
    c = TINY.n_embd
    assert len(targets) == 2 * TINY.n_layer
    assert trained(model) == len(targets) * (4 * c + 4 + c * 4 + c)
