"""`inject` on a model that is not ours: a LLaMA of Hugging Face transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from rwkv_peft.errors import ConfigError
from rwkv_peft.peft import inject
from rwkv_peft.peft.injection import adapter_parameters, peft_layers
from rwkv_peft.peft.registry import method_config, method_named
from tests.helpers import peft_section, relative_error
from tests.peft.llama import TARGETS, perturb, small_llama, tokens, weight_gradients

CASES = {
    "bone_row": ("bone", {"r": 8}),
    "bone_col": ("bone", {"r": 8, "mode": "col"}),
    "lora": ("lora", {"r": 8}),
    "dora": ("dora", {"r": 8}),
    "miss": ("miss", {"r": 8}),
    "pissa": ("pissa", {"r": 8}),
    "lora_ga": ("lora_ga", {"r": 8}),
    "adapter": ("adapter", {"r": 8}),
}
"""A method of each kind; all of them, as single layers: tests/peft/methods/test_methods.py."""


def injected(case, *, targets=TARGETS, dtype=torch.float32, size=0.0, **options):
    """Return the base, a copy with an adapter, and the names of its parameters; `size` of the noise on the adapter."""
    method, config = CASES[case]
    base = small_llama(wide_norms=dtype == torch.float64, **options).to(dtype)
    model = copy.deepcopy(base)
    peft = peft_section(method, config, peft_targets=targets)
    inject(model, peft.method, peft.peft_targets, gradients=weight_gradients(base, tokens()))
    names = adapter_parameters(model)
    model.to(dtype)  # the adapter, too: it is stored in fp32
    if size:
        perturb(model, names, size)
    return base, model, names


def merged(base, model):
    """A copy of the base that holds the merged weights."""
    result = copy.deepcopy(base)
    for name, layer in peft_layers(model).items():
        original = base.get_submodule(name).weight.detach()
        result.get_submodule(name).weight.data = layer.merged_weight(original)
    return result


@pytest.mark.parametrize("case", CASES)
def test_only_the_adapter_trains_and_the_output_at_init_is_the_bases(case):
    base, model, names = injected(case)
    layers = [name for name, _ in base.named_modules() if name.endswith(TARGETS)]
    method = method_named(CASES[case][0]).layer
    assert len(layers) == 14
    assert names == {f"{name}.{parameter}" for name in layers for parameter in method.adapter_names}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    factors = {f"{name}.{buffer}" for name, layer in peft_layers(model).items() for buffer in layer.initial_names}
    assert set(model.state_dict()) == set(base.state_dict()) | names | factors
    ids = tokens()
    assert relative_error(model(ids).logits, base(ids).logits) < 1e-5
    perturb(model, names)
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == names


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_unmerged(case):
    base, model, _ = injected(case, size=0.05)
    ids = tokens()
    plain, adapted = base(ids).logits, model(ids).logits
    assert relative_error(adapted, plain) > 1e-2, "the adapter must matter"
    layers = peft_layers(model).values()
    if all(layer.config.mergeable for layer in layers):
        assert relative_error(merged(base, model)(ids).logits, adapted) < 1e-5
    else:
        with pytest.raises(NotImplementedError):
            merged(base, model)


@pytest.mark.parametrize("case", [case for case in CASES if method_named(CASES[case][0]).config.mergeable])
def test_gradients_are_those_of_the_merged_weight(case):
    """The fast forms against autograd through W + dW, in float64."""
    base, model, names = injected(case, dtype=torch.float64, size=0.05)
    ids = tokens()
    trained = {name: p for name, p in model.named_parameters() if name in names}
    weights = {
        f"{name}.weight": (original := base.get_submodule(name).weight.detach()) + layer.delta_weight(original)
        for name, layer in peft_layers(model).items()
    }
    loss = functional_call(base, weights, kwargs={"input_ids": ids, "labels": ids}).loss
    expected = torch.autograd.grad(loss, list(trained.values()))
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(trained.values()))
    for name, a, b in zip(trained, found, expected, strict=True):
        assert relative_error(a, b) < 1e-9, name


@pytest.mark.parametrize("case", ["bone_row", "bone_col", "lora"])
def test_generates_like_the_merged_model(case):
    """Token by token with a cache: single rows without gradients take other forms of the same product."""
    base, model, _ = injected(case, size=0.05)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (m.generate(tokens(), pad_token_id=0, **options) for m in (model, merged(base, model)))
    assert torch.equal(found.sequences, expected.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-5


@pytest.mark.parametrize(
    ("case", "tied"), [("bone_row", False), ("bone_col", True), ("lora", False), ("dora", True), ("miss", False)]
)
def test_embedding_and_head_carry_an_adapter(case, tied):
    targets = ("embed_tokens", "lm_head")
    method, config = CASES[case]
    base = small_llama(tie_word_embeddings=tied, vocab_size=104)
    model = copy.deepcopy(base)
    assert inject(model, method_config(method, config), targets) == [
        "model.embed_tokens",
        "lm_head",
    ]
    perturb(model, adapter_parameters(model))
    ids = tokens()
    rows = model.model.embed_tokens.merged_weight(base.model.embed_tokens.weight.detach())
    assert relative_error(rows, base.model.embed_tokens.weight) > 1e-2, "the adapter must matter"
    assert relative_error(model.model.embed_tokens(ids), rows[ids]) < 1e-5
    hidden = torch.randn(2, 5, 64)
    assert relative_error(model.lm_head(hidden), hidden @ model.lm_head.effective_weight().mT) < 1e-5


@pytest.mark.parametrize("case", ["pissa", "lora_ga"])
def test_a_derived_head_leaves_the_embedding_it_is_tied_to(case):
    base, model, _ = injected(case, targets=("lm_head",), tie_word_embeddings=True)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    ids = tokens()
    assert relative_error(model(ids).logits, base(ids).logits) < 1e-5


def chosen(*targets, model=None, **config):
    """The names that carry an adapter, with Bone at r=8."""
    peft = peft_section("bone", {"r": 8} | config, peft_targets=targets)
    model = small_llama() if model is None else model
    names = inject(model, peft.method, peft.peft_targets)
    assert names == list(peft_layers(model))
    return names


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["k_proj"], ["0.self_attn.k_proj", "1.self_attn.k_proj"]),
        (["self_attn.k_proj"], ["0.self_attn.k_proj", "1.self_attn.k_proj"]),
        (["model.layers.1.mlp.up_proj"], ["1.mlp.up_proj"]),
        (["1.mlp.*"], ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        (["layers.0.*.[ud]*_proj"], ["0.mlp.up_proj", "0.mlp.down_proj"]),
        (["*.1.*.?_proj", "up_proj"], ["0.mlp.up_proj", *(f"1.self_attn.{x}_proj" for x in "qkvo"), "1.mlp.up_proj"]),
        (["up_proj", "*.1.mlp.up_proj"], ["0.mlp.up_proj", "1.mlp.up_proj"]),
    ],
)
def test_target_patterns(patterns, expected):
    """Whole names, their last segments, and globs over both; each layer once, in the model's order."""
    assert chosen(*patterns) == [f"model.layers.{name}" for name in expected]


def test_a_suffix_is_whole_segments():
    """`proj` is no layer's last segment, though every name ends with it."""
    with pytest.raises(ConfigError, match=r"--peft_targets proj: matches no linear layer"):
        chosen("proj")


def test_star_takes_every_linear_layer_and_no_embedding():
    names = chosen("*", model=small_llama(vocab_size=104))
    assert len(names) == 15
    assert names[-1] == "lm_head"


def test_a_pattern_that_matches_nothing_names_what_is_near():
    model = small_llama()
    near = r"--peft_targets model.layers.0.self_attn.qproj: .*Similar names: model.layers.0.self_attn.q_proj"
    with pytest.raises(ConfigError, match=near):
        chosen("v_proj", "model.layers.0.self_attn.qproj", model=model)
    assert not peft_layers(model), "nothing may be half injected"
    with pytest.raises(ConfigError, match=r"--peft_targets 0.mlp.upproj: .*Similar names: 0.mlp.up_proj, "):
        chosen("0.mlp.upproj", model=model)
    with pytest.raises(ConfigError, match=r"--peft_targets q_prj: .*Similar names: q_proj, "):
        chosen("q_prj", model=model)


def test_our_default_targets_are_not_a_llamas():
    with pytest.raises(ConfigError, match=r"--peft_targets att: matches no linear layer. Similar names: "):
        chosen()


def test_rank_pattern_gives_layers_their_own_r():
    model = small_llama()
    pattern = {"mlp.*": 16, "1.mlp.down_proj": 32, "self_attn.o_proj": 4}
    chosen("q_proj", "gate_proj", "down_proj", "o_proj", model=model, rank_pattern=pattern)
    ranks = {name.removeprefix("model.layers."): layer.config.r for name, layer in peft_layers(model).items()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".bone")}
    assert ranks == {f"{i}.self_attn.q_proj": 8 for i in (0, 1)} | {f"{i}.self_attn.o_proj": 4 for i in (0, 1)} | {
        "0.mlp.gate_proj": 16,
        "1.mlp.gate_proj": 16,
        "0.mlp.down_proj": 16,
        "1.mlp.down_proj": 32,  # the last match counts
    }
    assert shapes["model.layers.1.mlp.down_proj.bone"] == (3, 32, 32)
    assert shapes["model.layers.0.mlp.gate_proj.bone"] == (4, 16, 16)
    ids = tokens()
    assert relative_error(model(ids).logits, small_llama()(ids).logits) < 1e-5


def test_a_rank_pattern_that_matches_nothing_names_what_is_near():
    model = small_llama()
    near = r"--bone_config rank_pattern o_prj: matches no linear layer. Similar names: o_proj, "
    with pytest.raises(ConfigError, match=near):
        chosen("q_proj", "o_proj", model=model, rank_pattern={"q_proj": 16, "o_prj": 16})
    assert not peft_layers(model)


def test_a_rank_pattern_that_does_not_fit_names_the_layer():
    model = small_llama()
    with pytest.raises(ConfigError, match=r"r=64: does not fit model.layers.0.mlp.down_proj.weight \(64 x 96\)"):
        chosen("q_proj", "down_proj", model=model, rank_pattern={"down_proj": 64})
    assert not peft_layers(model)


def test_a_prompt_has_no_place_in_a_llama():
    with pytest.raises(ConfigError, match="this model does not support prompts"):
        inject(small_llama(), method_config("prompt", {}))


class Doubled(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Embedding):
    """An embedding that does more than look up, as Gemma's."""

    def forward(self, ids):
        return 8 * super().forward(ids)


class Plain(nn.Linear):
    """A layer with its own forward, which declares that it is a plain product."""

    plain_product = True

    def forward(self, x):
        return x @ self.weight.mT + self.bias


def test_layers_that_compute_more_than_a_product_are_not_targets():
    """A subclass with its own forward would lose it, and attention never calls its `out_proj`."""
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": Doubled(16, 16), "c": Plain(16, 16), "emb": Scaled(16, 16)})
    model["att"] = nn.MultiheadAttention(16, 2)
    assert chosen("*", model=model) == ["a", "c"]
    for name in ("b", "emb", "att.out_proj"):
        with pytest.raises(ConfigError, match=f"--peft_targets {name}: matches no linear layer"):
            chosen(name, model=model)
