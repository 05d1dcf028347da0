"""Hugging Face PEFT as an independent implementation: equal parameters, equal outputs, gradients and merged weights."""

from __future__ import annotations

import copy

import peft as hf
import pytest
import torch

from rwkv_peft.peft import inject
from rwkv_peft.peft.injection import adapter_parameters, initial_factors, peft_layers
from rwkv_peft.peft.registry import method_config
from tests.helpers import peft_section, relative_error
from tests.peft.llama import TARGETS, perturb, small_llama, tokens, weight_gradients

pytestmark = pytest.mark.filterwarnings(  # of theirs, at each other
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:Full backward hook:UserWarning"
)

# How Hugging Face lays parameters out, as our name -> (its attribute, a parameter or a module that holds one).
LORA = {"lora_A": "lora_A", "lora_B": "lora_B"}  # A (r, I) and B (O, r), as ours: both are weights of nn.Linear
DORA = LORA | {"lora_magnitude": "lora_magnitude_vector"}  # (O,), the length of each row of W, as ours
MISS = {"miss": "miss_block"}  # (r, O), row i added to column i of every block of r input columns, as ours
BAT = {"bone": "miss_block"}  # (O/r, r, r), W_ab B_a + B_a with a the output block: our `col`

# Every method whose init leaves the base alone: (our method and options, Hugging Face's config, names).
SAME_BASE = {
    "lora": ("lora", {"r": 8, "alpha": 8}, hf.LoraConfig(r=8, lora_alpha=8), LORA),
    "lora_alpha": ("lora", {"r": 8, "alpha": 24}, hf.LoraConfig(r=8, lora_alpha=24), LORA),
    "rslora": (
        "lora",
        {"r": 8, "alpha": 24, "rslora": True},
        hf.LoraConfig(r=8, lora_alpha=24, use_rslora=True),
        LORA,
    ),
    "dora": ("dora", {"r": 8, "alpha": 24}, hf.LoraConfig(r=8, lora_alpha=24, use_dora=True), DORA),
    "miss": ("miss", {"r": 8}, hf.MissConfig(r=8), MISS),
    "bone_col": ("bone", {"r": 8, "mode": "col"}, hf.MissConfig(r=8, init_weights="bat"), BAT),
}

# And those that take A and B out of the base; Hugging Face scales these two by alpha / r, which ours leave at 1.
# Its fast SVD takes r + 0 columns where ours takes 2 r, so only the exact ones can be equal.
DERIVED = {
    "pissa": ("pissa", {"r": 8, "svd_niter": 0}, hf.LoraConfig(r=8, lora_alpha=8, init_lora_weights="pissa"), LORA),
    "olora": ("olora", {"r": 8}, hf.LoraConfig(r=8, lora_alpha=8, init_lora_weights="olora"), LORA),
}

LORA_GA = hf.LoraConfig(
    r=8, lora_alpha=24, use_rslora=True, init_lora_weights="lora_ga", lora_ga_config=hf.LoraGAConfig(stable_gamma=9)
)
OUR_LORA_GA = {"r": 8, "alpha": 24, "gamma": 9.0}


def ours(base, method, options, gradients=None):
    """A copy of the base with our layers, the adapter in the base's dtype."""
    model = copy.deepcopy(base)
    inject(model, method_config(method, options), TARGETS, gradients=gradients)
    return model.to(base.dtype)


def theirs(base, config):
    """A copy of the base with Hugging Face's layers; eval mode, as the base."""
    config = copy.deepcopy(config)
    config.target_modules = set(TARGETS)
    return hf.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()


def their_layer(model, name):
    return model.base_model.model.get_submodule(name)


def their_parameter(model, name, names):
    """The parameter of Hugging Face that is ours of this name."""
    layer, _, parameter = name.rpartition(".")
    value = getattr(their_layer(model, layer), names[parameter])["default"]
    return value if isinstance(value, torch.nn.Parameter) else value.weight


def share_parameters(model, other, names):
    """Perturb our adapter and give the other the same values; (ours, theirs) pairs by name."""
    trained = adapter_parameters(model)
    perturb(model, trained, 0.1)
    pairs = {name: (p, their_parameter(other, name, names)) for name, p in model.named_parameters() if name in trained}
    with torch.no_grad():
        for found, expected in pairs.values():
            assert found.shape == expected.shape
            expected.copy_(found)
    return pairs


def assert_same_function(model, other, pairs, limit):
    """Logits, and the gradients of the inputs and of every trainable parameter."""
    embeds, results = torch.randn(2, 11, 64, dtype=model.dtype), []
    for side, net in enumerate((model, other)):
        x = embeds.clone().requires_grad_()
        output = net(inputs_embeds=x, labels=tokens())
        grads = torch.autograd.grad(output.loss, [x, *(pair[side] for pair in pairs.values())])
        results.append((output.logits, *grads))
    for name, a, b in zip(("logits", "inputs", *pairs), *results, strict=True):
        assert b.any(), name
        assert relative_error(a, b) < limit, name


def assert_same_merge(base, model, other, limit):
    layers = peft_layers(model)
    result = other.merge_and_unload()
    for name, layer in layers.items():
        original = base.get_submodule(name).weight.detach()
        merged = result.get_submodule(name).weight
        assert relative_error(merged, original) > 1e-2, "the adapter must matter"
        assert relative_error(layer.merged_weight(original), merged) < limit, name


def trained_by(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", SAME_BASE)
def test_equal_parameters_give_an_equal_model(case):
    """In float64, through the whole model."""
    method, options, config, names = SAME_BASE[case]
    base = small_llama(wide_norms=True).double()
    model, other = ours(base, method, options), theirs(base, config).double()
    assert trained_by(model) == trained_by(other)
    pairs = share_parameters(model, other, names)
    assert len(pairs) == 14 * len(names)
    assert_same_function(model, other, pairs, 1e-10)
    assert_same_merge(base, model, other, 1e-12)


@pytest.mark.parametrize("case", DERIVED)
def test_derived_bases_are_equal(case):
    """The residual and B A at init, in fp32, which is all that Hugging Face takes; then outputs as above."""
    method, options, config, names = DERIVED[case]
    base = small_llama(wide_norms=True)
    model, other = ours(base, method, options), theirs(base, config)
    for name, layer in peft_layers(model).items():
        a, b = (their_parameter(other, f"{name}.{factor}", names) for factor in ("lora_A", "lora_B"))
        original = base.get_submodule(name).weight
        assert relative_error(layer.weight, original) > 0.1, "the residual is another matrix than the base"
        # Singular vectors are given up to sign, so A and B are compared by their product and by absolute values.
        assert relative_error(layer.lora_B @ layer.lora_A, b @ a) < 1e-5, name
        assert relative_error(layer.lora_A.abs(), a.abs()) < 1e-4, name
        assert relative_error(layer.lora_B.abs(), b.abs()) < 1e-4, name
        assert relative_error(layer.weight, their_layer(other, name).base_layer.weight) < 1e-5, name
    # Theirs with our signs, from here on.
    pairs = share_parameters(model, other, names)
    assert_same_function(model, other, pairs, 1e-5)
    assert_same_merge(base, model, other, 1e-5)


def lora_ga_pair(base):
    """Ours and Hugging Face's from an equal gradient; it computes its own, so its training step is ours."""
    gradients = weight_gradients(base, tokens())
    prepared = copy.deepcopy(base)
    config = copy.deepcopy(LORA_GA)
    config.target_modules = set(TARGETS)

    def step():
        prepared(input_ids=tokens(), labels=tokens()).loss.backward()

    hf.tuners.lora.preprocess_loraga(prepared, config, step)
    for name, gradient in gradients.items():
        if name.endswith(TARGETS):
            assert relative_error(prepared.get_submodule(name)._peft_loraga_grad, gradient) < 1e-6
    return ours(base, "lora_ga", OUR_LORA_GA, gradients), hf.get_peft_model(prepared, config).eval()


def test_lora_ga_takes_the_same_singular_vectors():
    """Up to sign and length: peft 0.21 scales B alone, by the singular values too.

    The paper's algorithm 1 and its authors' code (github.com/Outsider565/LoRA-GA, "stable") scale A and B alike, by
    O^(1/4) / sqrt(gamma), and leave the singular values out. So do we.
    """
    base = small_llama(wide_norms=True)
    model, other = lora_ga_pair(base)
    for name, layer in peft_layers(model).items():
        a, b = (their_parameter(other, f"{name}.{factor}", LORA) for factor in ("lora_A", "lora_B"))
        length = layer.out_features**0.25 / 3  # sqrt(gamma)
        assert relative_error(layer.lora_A.abs(), length * a.abs()) < 1e-3, name
        assert relative_error(layer.lora_B.abs(), length * (b / b.norm(dim=0)).abs()) < 1e-3, name
        residual = base.get_submodule(name).weight - 24 / 8**0.5 * layer.lora_B @ layer.lora_A
        assert relative_error(layer.weight, residual) < 1e-5, name


def test_lora_ga_from_one_residual():
    """With their factors and residual instead of ours the model is theirs: forward, gradients and merge."""
    base = small_llama(wide_norms=True)
    model, other = lora_ga_pair(base)
    start = {name: their_parameter(other, name, LORA).detach().clone() for name in adapter_parameters(model)}
    factors = initial_factors(model)
    for name, value in start.items():
        layer, _, factor = name.rpartition(".")
        factors[f"{layer}.init_{factor}"].copy_(value)
        model.get_parameter(name).data.copy_(value)
    for name, layer in peft_layers(model).items():
        layer.weight.data.copy_(base.get_submodule(name).weight)
        layer.derive_base()
        residual = their_layer(other, name).base_layer.weight
        assert relative_error(layer.weight, residual) < 1e-5
        layer.weight.data.copy_(residual)
    model, other = model.double(), other.double()
    pairs = share_parameters(model, other, LORA)
    assert_same_function(model, other, pairs, 1e-10)
    assert_same_merge(base, model, other, 1e-5)


def test_lora_on_an_embedding():
    """Hugging Face's factors of an embedding are transposed: A (r, V) is our B (V, r), its B (C, r) our A (r, C).

    DoRA differs on an embedding, by convention: its lengths there are of W's columns (C), ours of the rows (V).
    """
    base = small_llama(wide_norms=True).double()
    model = copy.deepcopy(base)
    peft = peft_section("lora", {"r": 8, "alpha": 24}, peft_targets=("embed_tokens",))
    inject(model, peft.method, peft.peft_targets)
    perturb(model.double(), adapter_parameters(model), 0.1)
    config = hf.LoraConfig(r=8, lora_alpha=24, target_modules={"embed_tokens"})
    other = hf.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval().double()
    layer, their = model.model.embed_tokens, their_layer(other, "model.embed_tokens")
    a, b = their.lora_embedding_A["default"], their.lora_embedding_B["default"]
    a.data, b.data = layer.lora_B.detach().mT.clone(), layer.lora_A.detach().mT.clone()
    ids = tokens()
    found, expected = (net(input_ids=ids, labels=ids) for net in (model, other))
    assert relative_error(found.logits, base(ids).logits) > 1e-2, "the adapter must matter"
    assert relative_error(found.logits, expected.logits) < 1e-10
    grads = torch.autograd.grad(found.loss, [layer.lora_A, layer.lora_B])
    for mine, theirs in zip(grads, torch.autograd.grad(expected.loss, [b, a]), strict=True):
        assert relative_error(mine, theirs.mT) < 1e-10
