"""Bone's free grouping and its two ablations, compared with the paper's formulas (tests/peft/definitions.py)."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv_peft.ops import products
from rwkv_peft.ops.bone import variants
from rwkv_peft.ops.bone.layouts import block_affine_delta, bone_row
from rwkv_peft.ops.bone.variants import bone_group, bone_hadamard, bone_unconstrained
from tests.helpers import relative_error
from tests.peft.definitions import bone_delta

FORMS = {"group": bone_group, "unconstrained": bone_unconstrained, "hadamard": bone_hadamard}

CASES = [
    ("unconstrained", 64, 224, 16, 0, 1),
    ("unconstrained", 64, 64, 64, 0, 1),
    ("hadamard", 96, 96, 16, 0, 4),
    ("hadamard", 6, 4, 1, 0, 1000),
    ("group", 96, 96, 16, 3, 1),
    ("group", 96, 96, 16, 6, 1000),
    ("group", 96, 96, 16, 12, 4),
    ("group", 96, 96, 16, 36, 1000),
    ("group", 1024, 80, 16, 64, 3),
    ("group", 6, 4, 1, 3, 1),
]
"""(mode, O, I, r, g, row blocks per slice). The slices: one, several, and several of which the last is shorter."""


def bone_of(mode, in_features, r, g, dtype=torch.float64, scale=1.0):
    first = {"group": (g,), "unconstrained": (2, in_features // r), "hadamard": (in_features // r,)}[mode]
    return (scale * torch.randn(*first, r, r)).to(dtype).requires_grad_()


def errors(mode, x, weight, bone):
    """Return the relative errors of y and of both gradients, against float64 with the same inputs."""
    y = FORMS[mode](x, weight, bone)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, bone)]
    reference = exact[0] @ (weight.double() + bone_delta(weight.double(), exact[1], mode)).mT
    fast = (y, *torch.autograd.grad(y, (x, bone), grad))
    slow = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    assert [t.dtype for t in fast] == [x.dtype, x.dtype, bone.dtype]
    assert [t.shape for t in fast] == [t.shape for t in slow]
    return {name: relative_error(a, b) for name, a, b in zip(("y", "x", "bone"), fast, slow, strict=True)}


def test_the_cases_cover_every_kind_of_grouping():
    """g divides I/r; I/r divides g; both; neither."""
    groups = [(in_features // r, g) for mode, _, in_features, r, g, _ in CASES if mode == "group"]
    kinds = {(columns % g == 0, g % columns == 0) for columns, g in groups}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize(("mode", "out_features", "in_features", "r", "g", "blocks_per_slice"), CASES)
def test_outputs_and_gradients_equal_the_paper(monkeypatch, mode, out_features, in_features, r, g, blocks_per_slice):
    """Also if the slice size is not a multiple of a row block."""
    torch.manual_seed(0)
    monkeypatch.setattr(variants, "TILE_ELEMENTS", (blocks_per_slice * r + r // 2) * in_features)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    bone = bone_of(mode, in_features, r, g)
    assert relative_error(block_affine_delta(weight, bone, mode), bone_delta(weight, bone, mode)) < 1e-14
    assert max(errors(mode, x, weight, bone).values()) < 1e-12


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 2)])
def test_gradcheck(mode, g):
    torch.manual_seed(0)
    weight, bone = torch.randn(8, 12, dtype=torch.float64), bone_of(mode, 12, 4, g)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bone: FORMS[mode](x, weight, bone), (x, bone))


def test_group_with_one_matrix_per_input_block_is_row():
    torch.manual_seed(0)
    weight, bone = torch.randn(96, 64), torch.randn(4, 16, 16, requires_grad=True)
    x = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 96)
    group, row = (form(x, weight, bone) for form in (bone_group, bone_row))
    assert torch.equal(group, row)
    pairs = zip(*(torch.autograd.grad(y, (x, bone), grad) for y in (group, row)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 32)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "half_products", "rows"),
    [
        (torch.float32, torch.bfloat16, False, 1),
        (torch.bfloat16, torch.bfloat16, False, 100),
        (torch.bfloat16, torch.float32, True, 100),
        (torch.float16, torch.float16, True, 1),
    ],
)
def test_dtypes_and_numbers_of_rows(monkeypatch, mode, g, dtype, weight_dtype, half_products, rows):
    """With strided input and an fp32 adapter, with and without gradients.

    Products of bf16 rows are in fp32, as on a CPU without AMX, or in bf16, as on a GPU.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_has_amx", lambda: half_products)
    weight, bone = (torch.randn(256, 384) / 20).to(weight_dtype), bone_of(mode, 384, 16, g, torch.float32, 0.01)
    x = torch.randn(384, rows).to(dtype).T.requires_grad_()
    found = errors(mode, x, weight, bone)
    assert max(found.values()) < LIMITS[dtype], found
    with torch.no_grad():
        y = FORMS[mode](x, weight, bone)
        exact = weight.double() + bone_delta(weight.double(), bone.double(), mode)
        assert relative_error(y, x.double() @ exact.mT) < LIMITS[dtype]


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("hadamard", 0), ("group", 14)])
def test_one_gradient_alone(mode, g):
    """If only x or only the adapter needs a gradient, it is the same as with both."""
    torch.manual_seed(0)
    weight, bone = torch.randn(64, 112), bone_of(mode, 112, 16, g, torch.float32)
    x = torch.randn(5, 112, requires_grad=True)
    grad_x, grad_bone = torch.autograd.grad(FORMS[mode](x, weight, bone).sin().sum(), (x, bone))
    assert torch.equal(torch.autograd.grad(FORMS[mode](x, weight, bone.detach()).sin().sum(), x)[0], grad_x)
    assert torch.equal(torch.autograd.grad(FORMS[mode](x.detach(), weight, bone).sin().sum(), bone)[0], grad_bone)


@pytest.mark.parametrize(("mode", "g"), [("hadamard", 0), ("group", 6)])
def test_half_precision_rounds_w_plus_dw_once(monkeypatch, mode, g):
    """With unit vectors as rows, y is W + dW. A sum of rounded terms would often differ from the nearest bf16 value."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_has_amx", lambda: True)
    weight, bone = torch.randn(96, 64).bfloat16(), bone_of(mode, 64, 16, g, torch.float32)
    y = FORMS[mode](torch.eye(64).bfloat16(), weight, bone)
    exact = weight.double() + bone_delta(weight.double(), bone.double(), mode)
    assert (y.mT != exact.bfloat16()).double().mean() < 1e-3


class RowsOnly:
    """A weight that is not a tensor and only returns rows, like quantized weights."""

    def __init__(self, weight):
        self._weight, self.read_rows = weight, []
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.element_size = weight.element_size

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        assert rows.step is None
        self.read_rows.append(rows.stop - rows.start)
        return self._weight[rows].clone()

    def to(self, dtype):
        self.read_rows.append(self.shape[0])
        return self._weight.to(dtype, copy=True)


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("group", 56)])
def test_a_weight_that_is_not_a_tensor_gives_the_same(monkeypatch, mode, g):
    torch.manual_seed(0)
    monkeypatch.setattr(variants, "TILE_ELEMENTS", 32 * 112)
    weight, bone = torch.randn(64, 112).bfloat16(), bone_of(mode, 112, 16, g, torch.float32)
    x = torch.randn(5, 112, requires_grad=True)
    storage = RowsOnly(weight)
    results = []
    for w in (weight, storage):
        y = FORMS[mode](x, w, bone)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, bone))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if mode != "unconstrained":
        assert storage.read_rows == [32] * 4, "two slices forward and two back, of two row blocks each"


def kept_for_backward(function):
    """Return every tensor in the graph of function()'s result: saved tensors, and attributes of operator contexts."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = function()
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        kept += [value for value in getattr(node, "__dict__", {}).values() if isinstance(value, torch.Tensor)]
        nodes += [following for following, _ in node.next_functions if following is not None]
    return kept


@pytest.mark.parametrize(
    ("mode", "g", "dtype"),
    [("unconstrained", 0, torch.float32), ("hadamard", 0, torch.bfloat16), ("group", 64, torch.bfloat16)],
)
def test_backward_keeps_nothing_weight_sized(mode, g, dtype):
    """Except for the frozen weight itself, every tensor in the graph is smaller than the weight."""
    weight, bone = torch.randn(512, 512).to(dtype), bone_of(mode, 512, 16, g, torch.float32)
    x = torch.randn(4, 512).to(dtype).requires_grad_()
    kept = kept_for_backward(lambda: FORMS[mode](x, weight, bone))
    own = [t for t in kept if t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()]
    others = [t for t in kept if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
    assert len(own) == 1
    assert math.prod(weight.shape) // 4 > max(t.numel() for t in others)


@pytest.mark.parametrize(
    ("mode", "g", "weight_dtype", "r", "half_products"),
    [
        ("unconstrained", 0, torch.float32, 16, False),
        ("unconstrained", 0, torch.bfloat16, 8, True),
        ("hadamard", 0, torch.bfloat16, 16, True),
        ("group", 6, torch.float32, 8, False),
    ],
)
def test_autocast_changes_nothing(monkeypatch, mode, g, weight_dtype, r, half_products):
    """Neither with the compiled block products nor with torch's, which r = 8 uses."""
    monkeypatch.setattr(products, "_has_amx", lambda: half_products)
    torch.manual_seed(0)
    weight, bone = torch.randn(96, 64).to(weight_dtype), bone_of(mode, 64, r, g, torch.float32)
    x = torch.randn(70, 64, requires_grad=True)

    def run():
        y = FORMS[mode](x, weight, bone)
        return (y, *torch.autograd.grad(y.sum(), (x, bone)))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(plain, run(), strict=True))


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("group", 6)])
def test_second_derivatives_are_refused(mode, g):
    x, bone = torch.randn(5, 64, requires_grad=True), bone_of(mode, 64, 16, g, torch.float32)
    y = FORMS[mode](x, torch.randn(96, 64), bone)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(("mode", "g"), [("unconstrained", 0), ("group", 6)])
def test_compiles_to_one_graph(mode, g):
    """torch.compile needs no graph break, and the results are the same."""
    torch.manual_seed(0)
    weight, bone = torch.randn(96, 64), bone_of(mode, 64, 16, g, torch.float32)
    x = torch.randn(70, 64, requires_grad=True)
    plain = FORMS[mode]
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(x, weight, bone).sin().sum(), (x, bone)) for f in (compiled, plain)]
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_the_error_lists_the_layouts():
    with pytest.raises(ValueError, match=r"mode must be row, .* or hadamard; found 'rows'"):
        block_affine_delta(torch.zeros(4, 4), torch.zeros(2, 2, 2), "rows")
