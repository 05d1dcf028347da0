"""Bone itself: the definition, what backward keeps, its options and its sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rwkv_peft.errors import ConfigError
from rwkv_peft.model.init import model_on_meta
from rwkv_peft.ops import products
from rwkv_peft.ops.bone.layouts import add_stochastically, block_affine_delta, bone_col, bone_left, bone_row
from rwkv_peft.peft.injection import inject
from rwkv_peft.peft.methods.bone import BoneLinear
from rwkv_peft.peft.registry import method_config
from tests.helpers import TINY, relative_error
from tests.peft.definitions import bone_delta

FORMS = {"row": bone_row, "col": bone_col, "left": bone_left}


@pytest.mark.parametrize("mode", FORMS)
def test_forms_equal_the_paper(mode):
    torch.manual_seed(0)
    for out_features, in_features, r in ((96, 64, 32), (64, 224, 16), (64, 64, 64), (6, 4, 1)):
        weight = torch.randn(out_features, in_features, dtype=torch.float64)
        bone = torch.randn((in_features if mode == "row" else out_features) // r, r, r, dtype=torch.float64)
        x = torch.randn(2, 3, in_features, dtype=torch.float64)
        delta = bone_delta(weight, bone, mode)
        assert relative_error(block_affine_delta(weight, bone, mode), delta) < 1e-14
        assert relative_error(FORMS[mode](x, weight, bone), x @ (weight + delta).T) < 1e-12


@pytest.mark.parametrize("mode", FORMS)
def test_gradcheck(mode):
    torch.manual_seed(0)
    weight = torch.randn(8, 12, dtype=torch.float64)
    bone = torch.randn((12 if mode == "row" else 8) // 4, 4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bone: FORMS[mode](x, weight, bone), (x, bone))


def test_col_in_several_groups_of_rows():
    """1,536 output rows take three groups; each must land in its own place, forward and backward."""
    torch.manual_seed(0)
    weight = torch.randn(1536, 64, dtype=torch.float64)
    bone = torch.randn(24, 64, 64, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 1536, dtype=torch.float64)
    fast = bone_col(x, weight, bone)
    slow = x @ (weight + block_affine_delta(weight, bone, "col")).T
    assert relative_error(fast, slow) < 1e-12
    pairs = zip(torch.autograd.grad(fast, (x, bone), grad), torch.autograd.grad(slow, (x, bone), grad), strict=True)
    assert all(relative_error(a, b) < 1e-12 for a, b in pairs)


@pytest.mark.parametrize("mode", FORMS)
def test_backward_keeps_nothing_weight_sized(mode):
    """Apart from the frozen weight itself, no saved tensor is as large as the weight."""
    weight = torch.randn(512, 512)
    bone = torch.zeros(512 // 16, 16, 16, requires_grad=True)
    x = torch.randn(4, 512, requires_grad=True)
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        FORMS[mode](x, weight, bone)
    others = [t for t in saved if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
    assert saved
    assert max(t.numel() for t in others) < weight.numel() / 4


def test_non_contiguous_input():
    torch.manual_seed(0)
    x = torch.randn(64, 5).T
    weight, bone = torch.randn(32, 64), torch.randn(2, 16, 16)
    assert relative_error(bone_col(x, weight, bone), bone_col(x.contiguous(), weight, bone)) < 1e-6


def test_r_that_does_not_fit_names_the_matrix_and_what_fits():
    model = model_on_meta(TINY)
    with pytest.raises(ConfigError) as error:
        inject(model, method_config("bone", {"r": 48}))
    message = str(error.value)
    assert "r=48: does not fit blocks.0.att.receptance.weight (64 x 64): 48 does not divide 64" in message
    assert "8, 16, 32, 64" in message
    assert not any("bone" in name for name, _ in model.named_parameters()), "nothing may be half injected"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bone_r": 32, "bone_load": ""}, (32, "row")),
        ({"r": 32, "bone_mode": "bat"}, (32, "row")),
        ({"r": 32, "bone_mode": "col"}, (32, "col")),
    ],
)
def test_older_spellings(options, expected):
    config = method_config("bone", options)
    assert (config.r, config.mode) == expected


def test_an_ambiguous_spelling_is_explained():
    with pytest.raises(ConfigError, match="bat is col; RWKV-PEFT's bone_mode bat is row"):
        method_config("bone", {"mode": "bat"})


def test_goes_onto_a_foreign_module():
    """Any module of plain nn.Linear layers will do."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    assert inject(model, method_config("bone", {"r": 16}), ("*",)) == ["0", "2"]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "0.bone", "2.weight", "2.bias", "2.bone"}


def test_stochastic_rounding_is_right_in_the_mean():
    """Each draw is a neighbour of the exact sum, and their mean is the sum; exact sums stay."""
    torch.manual_seed(0)
    a = torch.tensor([[1.0, -1.0, 100.0, 0.0, 3.0]]).bfloat16()
    b = torch.tensor([[2.0**-12, 2.0**-11, -0.1, 1e-3, 1.0]]).bfloat16()
    exact = a.double() + b.double()
    draws = torch.cat([add_stochastically(a, b) for _ in range(20_000)]).double()
    step = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((draws - exact).abs() < step).all()
    assert ((draws.mean(0) - exact).abs() < 4 * step / 2 / 20_000**0.5 + 1e-12).all()
    assert (draws[:, 3:] == torch.tensor([b[0, 3].item(), 4.0])).all()


def test_stochastic_rounding_keeps_inf_and_nan():
    a = torch.tensor([[float("inf"), float("-inf"), float("nan")]]).bfloat16()
    total = add_stochastically(a, torch.ones_like(a))
    assert total[0, 0] == float("inf")
    assert total[0, 1] == float("-inf")
    assert total[0, 2].isnan()


@pytest.fixture
def half_products(monkeypatch):
    """Products in bf16, as on a GPU or a CPU with AMX, whatever this machine prefers."""
    monkeypatch.setattr(products, "_has_amx", lambda: True)


@pytest.fixture
def wide_products(monkeypatch):
    """bf16 rows multiplied in fp32, whatever this machine prefers."""
    monkeypatch.setattr(products, "_has_amx", lambda: False)


def preserved_share(layer, size, draws=8):
    """Return the share of the true update that is preserved in a bf16 y, over many rows, against float64.

    `layer(x, weight, size)` gives y and the definition's dW.
    """
    torch.manual_seed(0)
    weight = (torch.randn(256, 256) / 16).bfloat16()
    x = torch.randn(4096, 256).bfloat16()
    before = x.double() @ weight.double().mT
    shares = []
    for _ in range(draws):
        y, delta = layer(x, weight, size)
        update = x.double() @ delta.mT
        shares.append((((y.double() - before) * update).sum() / update.square().sum()).item())
    return sum(shares) / draws


def bone_layer(mode, stochastic):
    def layer(x, weight, size):
        bone = size * torch.randn(8, 32, 32)
        bone = bone.bfloat16().float()  # what products in bf16 would make of it
        return FORMS[mode](x, weight, bone, stochastic), block_affine_delta(weight.double(), bone.double(), mode)

    return layer


@pytest.mark.parametrize("mode", FORMS)
@pytest.mark.parametrize("size", [1e-5, 1e-3])
def test_stochastic_rounding_does_not_swallow_the_update(half_products, mode, size):
    assert preserved_share(bone_layer(mode, True), size) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("mode", FORMS)
def test_wide_products_do_not_swallow_the_update(wide_products, mode):
    """Without any option: one rounding, of y."""
    assert preserved_share(bone_layer(mode, False), 1e-5) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_wide_products_preserve_the_smallest_update(wide_products):
    """The rounding of y is a thousand times the update, so it takes more draws."""
    assert preserved_share(bone_layer("row", False), 1e-6, draws=48) == pytest.approx(1, abs=0.1)


def test_bf16_products_swallow_most_of_a_small_update(half_products):
    """Shows why the option and the wider products exist: without this loss, they would only cost time."""
    assert preserved_share(bone_layer("row", False), 2e-5) < 0.6
    assert preserved_share(bone_layer("col", False), 2e-5) < 0.95


def test_rounding_is_stochastic_in_bf16_training_only(half_products):
    layer = BoneLinear(
        nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), method_config("bone", {"r": 16, "rounding": "stochastic"})
    )
    nn.init.normal_(layer.bone, std=1e-3)
    x = torch.randn(8, 64).bfloat16()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x.float()), layer(x.float()))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("mode", "cp"), [("row", 0), ("col", 1), ("left", 0), ("col", 0)])
def test_materialized_form_equals_the_fused_one(mode, cp):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, dtype=torch.float64)
    layers = [
        BoneLinear(linear, method_config("bone", {"r": 16, "mode": mode} | options), torch.float64)
        for options in ({}, {"impl": "materialized", "cp": cp})
    ]
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in layers:
        torch.manual_seed(1)
        nn.init.normal_(layer.bone)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, layer.bone))))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("cp", "weights_kept"), [(0, 1), (1, 0)])
def test_bone_checkpointing_keeps_no_materialized_weight(cp, weights_kept):
    options = {"r": 16, "mode": "col", "impl": "materialized", "cp": cp}
    layer = BoneLinear(nn.Linear(512, 512, bias=False), method_config("bone", options))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(4, 512, requires_grad=True))
    large = [t for t in saved if t.numel() == layer.weight.numel() and t.data_ptr() != layer.weight.data_ptr()]
    assert bool(large) == bool(weights_kept)


@pytest.mark.parametrize("mode", FORMS)
def test_rows_and_block_sizes(mode):
    """Output and gradients, on strided input, against the definition in float64 on the same values."""
    for r, rows, dtype, weight_dtype in (
        (16, 1, torch.float32, torch.float32),
        (128, 1, torch.bfloat16, torch.bfloat16),
        (16, 17, torch.float32, torch.bfloat16),
        (128, 17, torch.float16, torch.float16),
        (16, 100, torch.bfloat16, torch.float32),
        (128, 100, torch.float32, torch.float32),
        (16, 8192, torch.bfloat16, torch.bfloat16),
        (128, 8192, torch.float32, torch.float32),
    ):
        torch.manual_seed(0)
        weight = (torch.randn(256, 384) / 20).to(weight_dtype)
        bone = (torch.randn((384 if mode == "row" else 256) // r, r, r) / 100).requires_grad_()
        x = torch.randn(384, rows).to(dtype).T.requires_grad_()
        grad = torch.randn(rows, 256).to(dtype)
        y = FORMS[mode](x, weight, bone)
        exact = [t.detach().double().requires_grad_() for t in (x, bone)]
        reference = exact[0] @ (weight.double() + bone_delta(weight.double(), exact[1], mode)).mT
        fast, slow = torch.autograd.grad(y, (x, bone), grad), torch.autograd.grad(reference, exact, grad.double())
        limit = 1e-2 if dtype != torch.float32 else 1e-6 if rows < 1000 else 3e-6  # fp32 sums of thousands of rows
        for name, a, b in zip(("y", "x", "bone"), (y, *fast), (reference, *slow), strict=True):
            assert a.dtype == (torch.float32 if name == "bone" else dtype)
            assert relative_error(a, b) < limit, (name, r, rows, dtype)
        with torch.no_grad():
            assert relative_error(FORMS[mode](x, weight, bone), reference) < limit


@pytest.mark.parametrize(("rows", "autocast"), [(8, False), (80, True)])
def test_stochastic_col_leaves_an_fp32_base_alone(half_products, rows, autocast):
    """bf16 rows on an fp32 weight: it is read, rounded, and never written to."""
    weight = torch.randn(96, 64)
    before, x, bone = weight.clone(), torch.randn(rows, 64).bfloat16(), torch.randn(6, 16, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = bone_col(x, weight, bone, True)
    y.float().sum().backward()
    assert torch.equal(weight, before)
    assert relative_error(y, x.double() @ (weight + block_affine_delta(weight, bone, "col")).double().mT) < 2e-2


@pytest.mark.parametrize("mode", FORMS)
def test_autocast_and_accumulated_gradients(mode):
    """An fp32 input meets a bf16 weight; gradients of two batches add up."""
    torch.manual_seed(0)
    options = {"r": 16, "mode": mode}
    layer = BoneLinear(nn.Linear(64, 96, bias=False, dtype=torch.bfloat16), method_config("bone", options))
    nn.init.normal_(layer.bone, std=0.1)
    batches = torch.randn(2, 70, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for x in batches:
            layer(x).sum().backward()
    summed, layer.bone.grad = layer.bone.grad, None
    layer(batches.flatten(0, 1)).sum().backward()
    assert relative_error(summed, layer.bone.grad) < 1e-5


@pytest.mark.parametrize("mode", FORMS)
def test_compiles_whole(mode):
    """torch.compile takes a layer without a break in the graph, and agrees."""
    layer = BoneLinear(nn.Linear(64, 96, bias=False), method_config("bone", {"r": 16, "mode": mode}))
    nn.init.normal_(layer.bone, std=0.1)
    x = torch.randn(70, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x).sin().sum(), (x, layer.bone)) for f in (compiled, layer)), strict=True):
        assert relative_error(a, b) < 1e-6
