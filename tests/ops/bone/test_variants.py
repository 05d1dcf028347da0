"""Bone's free grouping and its two ablations, against the paper's formulas written with two loops."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv_peft.ops import products
from rwkv_peft.ops.bone import variants as block_affine_variants
from rwkv_peft.ops.bone.layouts import block_affine_delta, bone_row
from rwkv_peft.ops.bone.variants import bone_group, bone_hadamard, bone_unconstrained
from tests.helpers import relative_error

FORMS = {"group": bone_group, "unconstrained": bone_unconstrained, "hadamard": bone_hadamard}

SIZES = [(96, 64, 32), (64, 224, 16), (64, 64, 64), (6, 4, 1), (96, 96, 16), (1024, 80, 16)]
"""(O, I, r)"""


def groups(out_features, in_features, r):
    """Every g that divides the number of blocks."""
    count = out_features // r * (in_features // r)
    return [g for g in range(1, count + 1) if count % g == 0]


def cases(sizes):
    """(mode, O, I, r, g), every g of every size."""
    ablations = [(mode, *size, 0) for size in sizes for mode in ("unconstrained", "hadamard")]
    return ablations + [("group", *size, g) for size in sizes for g in groups(*size)]


def bone_of(mode, in_features, r, g, dtype=torch.float64, scale=1.0):
    first = {"group": (g,), "unconstrained": (2, in_features // r), "hadamard": (in_features // r,)}[mode]
    return (scale * torch.randn(*first, r, r)).to(dtype).requires_grad_()


def delta_block_by_block(weight, bone, mode):
    """Equations 4, 11 and 12 with two loops and nothing clever; differentiable in bone."""
    r = bone.shape[-1]
    rows, count = [], 0
    for a in range(weight.shape[0] // r):
        row = []
        for b in range(weight.shape[1] // r):
            block = weight[a * r : a * r + r, b * r : b * r + r]
            if mode == "group":
                row.append(block @ bone[count % len(bone)] + bone[count % len(bone)])
            elif mode == "unconstrained":
                row.append(block @ bone[0, b] + bone[1, b])
            else:
                row.append(block * bone[b] + bone[b])
            count += 1
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def errors(mode, x, weight, bone):
    """Relative errors of y and of both gradients; the reference is in float64, on the same numbers."""
    y = FORMS[mode](x, weight, bone)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, bone)]
    reference = exact[0] @ (weight.double() + delta_block_by_block(weight.double(), exact[1], mode)).mT
    fast = (y, *torch.autograd.grad(y, (x, bone), grad))
    slow = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    assert [t.dtype for t in fast] == [x.dtype, x.dtype, bone.dtype]
    assert [t.shape for t in fast] == [t.shape for t in slow]
    return {name: relative_error(a, b) for name, a, b in zip(("y", "x", "bone"), fast, slow, strict=True)}


def test_the_sizes_cover_every_kind_of_grouping():
    """g divides I/r; I/r divides g, with several g; neither divides the other."""
    kinds = set()
    for out_features, in_features, r in SIZES:
        for g in groups(out_features, in_features, r):
            kinds.add((in_features // r % g == 0, g % (in_features // r) == 0))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("blocks_at_a_time", [1, 3, 1000])
@pytest.mark.parametrize(("mode", "out_features", "in_features", "r", "g"), cases(SIZES))
def test_outputs_and_gradients_equal_the_paper(monkeypatch, mode, out_features, in_features, r, g, blocks_at_a_time):
    """Whether W takes one slice or many, the last of them shorter, and sizes that end within a block."""
    torch.manual_seed(0)
    monkeypatch.setattr(block_affine_variants, "TILE_NUMBERS", (blocks_at_a_time * r + r // 2) * in_features)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    bone = bone_of(mode, in_features, r, g)
    assert relative_error(block_affine_delta(weight, bone, mode), delta_block_by_block(weight, bone, mode)) < 1e-14
    assert max(errors(mode, x, weight, bone).values()) < 1e-12


@pytest.mark.parametrize(("mode", "out_features", "in_features", "r", "g"), cases([(8, 12, 4), (12, 8, 2)]))
def test_gradcheck(mode, out_features, in_features, r, g):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    bone, x = bone_of(mode, in_features, r, g), torch.randn(3, in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bone: FORMS[mode](x, weight, bone), (x, bone))


def test_group_of_one_row_of_blocks_is_row():
    torch.manual_seed(0)
    weight, bone = torch.randn(96, 64), torch.randn(4, 16, 16, requires_grad=True)
    x = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 96)
    group, row = (form(x, weight, bone) for form in (bone_group, bone_row))
    assert torch.equal(group, row)
    pairs = zip(*(torch.autograd.grad(y, (x, bone), grad) for y in (group, row)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(params=[False, True], ids=["wide products", "half products"])
def half_products(request, monkeypatch):
    """Products of bf16 rows in fp32, as on a CPU without AMX, or in bf16, as on a GPU."""
    monkeypatch.setattr(products, "_has_amx", lambda: request.param)


LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 12), ("group", 32)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_and_numbers_of_rows(half_products, mode, g, rows, dtype, weight_dtype):
    """On strided input, with an adapter in fp32; with and without gradients."""
    torch.manual_seed(0)
    weight, bone = (torch.randn(256, 384) / 20).to(weight_dtype), bone_of(mode, 384, 16, g, torch.float32, 0.01)
    x = torch.randn(384, rows).to(dtype).T.requires_grad_()
    found = errors(mode, x, weight, bone)
    assert max(found.values()) < LIMITS[dtype], found
    with torch.no_grad():
        y = FORMS[mode](x, weight, bone)
        exact = weight.double() + delta_block_by_block(weight.double(), bone.double(), mode)
        assert relative_error(y, x.double() @ exact.mT) < LIMITS[dtype]


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 7), ("group", 14)])
@pytest.mark.parametrize("wanted", ["x", "bone"])
def test_one_gradient_alone(mode, g, wanted):
    """A first layer's x, or an adapter that is frozen, wants none, and changes nothing in the other."""
    torch.manual_seed(0)
    weight, bone = torch.randn(64, 112), bone_of(mode, 112, 16, g, torch.float32)
    x = torch.randn(5, 112, requires_grad=True)
    both = dict(
        zip(("x", "bone"), torch.autograd.grad(FORMS[mode](x, weight, bone).sin().sum(), (x, bone)), strict=True)
    )
    inputs = {"x": x, "bone": bone} | {"x" if wanted == "bone" else "bone": (bone, x)[wanted == "bone"].detach()}
    y = FORMS[mode](inputs["x"], weight, inputs["bone"])
    assert torch.equal(torch.autograd.grad(y.sin().sum(), inputs[wanted])[0], both[wanted])


@pytest.mark.parametrize(("mode", "g"), [("hadamard", 0), ("group", 6)])
def test_half_precision_rounds_w_plus_dw_once(monkeypatch, mode, g):
    """Rows that are unit vectors read W + dW off; a sum of rounded terms would often end beside the nearest number."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_has_amx", lambda: True)
    weight, bone = torch.randn(96, 64).bfloat16(), bone_of(mode, 64, 16, g, torch.float32)
    y = FORMS[mode](torch.eye(64).bfloat16(), weight, bone)
    exact = weight.double() + delta_block_by_block(weight.double(), bone.double(), mode)
    assert (y.mT != exact.bfloat16()).double().mean() < 1e-3


class RowsOnly:
    """A weight as a quantised storage would be: rows on request, and no tensor."""

    def __init__(self, weight):
        self._weight, self.asked = weight, []
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.element_size = weight.element_size

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        assert rows.step is None
        self.asked.append(rows.stop - rows.start)
        return self._weight[rows].clone()

    def to(self, dtype):
        self.asked.append(self.shape[0])
        return self._weight.to(dtype, copy=True)


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 56)])
def test_a_weight_that_is_no_tensor_gives_the_same(monkeypatch, mode, g):
    torch.manual_seed(0)
    monkeypatch.setattr(block_affine_variants, "TILE_NUMBERS", 32 * 112)
    weight, bone = torch.randn(64, 112).bfloat16(), bone_of(mode, 112, 16, g, torch.float32)
    x = torch.randn(5, 112, requires_grad=True)
    storage = RowsOnly(weight)
    results = []
    for w in (weight, storage):
        y = FORMS[mode](x, w, bone)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, bone))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if mode != "unconstrained":
        assert storage.asked == [32] * 4, "two slices forward and two back, of two row blocks each"


def kept_for_backward(function):
    """Every tensor that the graph of function()'s result holds: saved, or an attribute of an operator's context."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = function()
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        kept += [value for value in getattr(node, "__dict__", {}).values() if isinstance(value, torch.Tensor)]
        nodes += [following for following, _ in node.next_functions if following is not None]
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 8), ("group", 32), ("group", 64)]
)
def test_backward_keeps_nothing_weight_sized(mode, g, dtype):
    """What the graph holds besides the frozen weight itself stays below the size of the weight."""
    weight, bone = torch.randn(512, 512).to(dtype), bone_of(mode, 512, 16, g, torch.float32)
    x = torch.randn(4, 512).to(dtype).requires_grad_()
    kept = kept_for_backward(lambda: FORMS[mode](x, weight, bone))
    own = [t for t in kept if t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()]
    others = [t for t in kept if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
    assert len(own) == 1
    assert math.prod(weight.shape) // 4 > max(t.numel() for t in others)


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 4), ("group", 6)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [16, 8])
def test_autocast_changes_nothing(half_products, mode, g, weight_dtype, r):
    """In the compiled products of blocks, and in those of torch, which r = 8 takes."""
    torch.manual_seed(0)
    weight, bone = torch.randn(96, 64).to(weight_dtype), bone_of(mode, 64, r, g, torch.float32)
    x = torch.randn(70, 64, requires_grad=True)

    def run():
        y = FORMS[mode](x, weight, bone)
        return (y, *torch.autograd.grad(y.sum(), (x, bone)))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(plain, run(), strict=True))


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 6)])
def test_second_derivatives_are_refused(mode, g):
    x, bone = torch.randn(5, 64, requires_grad=True), bone_of(mode, 64, 16, g, torch.float32)
    y = FORMS[mode](x, torch.randn(96, 64), bone)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 2), ("group", 6)])
def test_compiles_whole(mode, g):
    """torch.compile takes the operator without a break in the graph, and agrees."""
    torch.manual_seed(0)
    weight, bone = torch.randn(96, 64), bone_of(mode, 64, 16, g, torch.float32)
    x = torch.randn(70, 64, requires_grad=True)
    plain = FORMS[mode]
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(x, weight, bone).sin().sum(), (x, bone)) for f in (compiled, plain)]
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_an_unknown_layout_is_named():
    with pytest.raises(ValueError, match="mode 'rows' is none of row, col, left, group, unconstrained, hadamard"):
        block_affine_delta(torch.zeros(4, 4), torch.zeros(2, 2, 2), "rows")
