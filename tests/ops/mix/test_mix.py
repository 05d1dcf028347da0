"""The compiled mixes, gated norm and squared ReLU, compared with their definitions in float64."""

import pytest
import torch

from rwkv_peft.ops.mix import op as mix
from rwkv_peft.ops.mix import reference as mix_reference
from rwkv_peft.ops.mix.native import load_native
from tests.helpers import relative_error
from tests.ops.cpu_levels import each_cpu_level

EPS = 64e-5
RANK = 4
OPERATORS = ("ddlerp", "shift_lerp", "decay", "gated_norm", "relu_square")
OPTIONS = {"gated_norm": (3, EPS)}
SHAPES = [(1, 1, 48), (2, 7, 51), (3, 300, 33), (1, 513, 48)]
"""(B, T, C): one token; odd sizes; sequences that end inside a chunk of 256 rows; a chunk with one row."""
CASES = [
    *((name, shape) for name in ("ddlerp", "shift_lerp") for shape in SHAPES),
    *((name, (3, 300, 33)) for name in ("decay", "gated_norm", "relu_square")),  # these do not work in chunks
]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if reason := load_native():
        pytest.skip(f"no compiled operators: {reason}")


def make_inputs(name: str, B: int, T: int, C: int, dtype=torch.float32, parameter_dtype=None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, last = normal(B, T, C).to(dtype), normal(B, C).to(dtype)
    parameters = {
        "ddlerp": [normal(C), normal(C, 5 * RANK) / C**0.5, normal(5, C), normal(5, RANK, C) / 4],
        "shift_lerp": [normal(2, C)],
        "decay": [normal(C), normal(C, RANK) / C**0.5, normal(RANK, C)],
        "gated_norm": [normal(C), normal(C)],
        "relu_square": [],
    }[name]
    activations = {"ddlerp": [x, last], "shift_lerp": [x, last], "gated_norm": [x, normal(B, T, C).to(dtype)]}
    return [*activations.get(name, [x]), *(p.to(parameter_dtype or dtype) for p in parameters)]


def form(name: str, module=mix):
    """Return an operator as a function of its tensors."""
    return lambda *tensors: getattr(module, name)(*tensors, *OPTIONS.get(name, ()))


def run(name: str, inputs: list[torch.Tensor], trained=None, module=mix) -> dict[str, torch.Tensor]:
    """Return outputs, and gradients of the inputs with indices `trained` (all) for a fixed gradient of the outputs."""
    leaves = [x.detach().requires_grad_(trained is None or i in trained) for i, x in enumerate(inputs)]
    outputs = form(name, module)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    return found | {f"grad {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_fp32_equals_the_definition(name, shape):
    inputs = make_inputs(name, *shape)
    exact = run(name, [x.double() for x in inputs], module=mix_reference)
    for level in each_cpu_level("mix"):
        found = run(name, inputs)
        assert found.keys() == exact.keys()
        for key, value in found.items():
            assert value.dtype == torch.float32
            assert relative_error(value, exact[key]) < 2e-6, (level, key)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_bf16_is_as_precise_as_plain_operations(name, shape):
    """Computed in fp32 and rounded once. The gradient of squared ReLU also has the rounding error of its output."""
    for parameter_dtype in (torch.bfloat16, torch.float32):
        inputs = make_inputs(name, *shape, torch.bfloat16, parameter_dtype)
        exact = run(name, [x.double() for x in inputs], module=mix_reference)
        plain = run(name, inputs, module=mix_reference)
        for level in each_cpu_level("mix"):
            for key, value in run(name, inputs).items():
                assert value.dtype == plain[key].dtype, key
                one_rounding = 2.6e-3 if name == "relu_square" and key.startswith("grad") else 2.2e-3
                limit = max(one_rounding, 1.1 * relative_error(plain[key], exact[key]))
                assert relative_error(value, exact[key]) < limit, (level, parameter_dtype, key)


def test_bf16_is_rounded_to_even():
    """As in torch. The mean of two bf16 values is often halfway between two others."""
    x, last, _ = make_inputs("shift_lerp", 2, 41, 50, torch.bfloat16)
    half = torch.full((2, 50), 0.5)
    exact = mix_reference.shift_lerp(x.float(), last.float(), half)
    for level in each_cpu_level("mix"):
        for found, expected in zip(mix.shift_lerp(x, last, half), exact, strict=True):
            assert torch.equal(found, expected.bfloat16()), level


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(name):
    inputs = [x.double().requires_grad_() for x in make_inputs(name, 2, 3, 6)]
    assert torch.autograd.gradcheck(form(name), inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_strides_and_threads_change_nothing(name):
    inputs = make_inputs(name, 2, 70, 192)
    plain = run(name, inputs)
    strided = [torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    torch.set_num_threads(3)
    for key, value in run(name, strided).items():
        if name in ("ddlerp", "decay"):  # matrix products may sum in another order
            assert relative_error(value, plain[key]) < 1e-6, key
        else:
            assert torch.equal(value, plain[key]), key


@pytest.mark.parametrize("name", ["ddlerp", "shift_lerp", "decay", "gated_norm"])
def test_frozen_parameters_change_no_other_gradient(name):
    inputs = make_inputs(name, 2, 9, 48, torch.bfloat16)
    both, alone = run(name, inputs), run(name, inputs, trained={0})
    assert [key for key in alone if key.startswith("grad")] == ["grad 0"]
    assert torch.equal(both["grad 0"], alone["grad 0"])


def test_an_overflow_stays_in_its_sequence():
    """NaN gradients of one sequence do not change the gradients of the other sequences in the batch."""
    inputs = make_inputs("ddlerp", 3, 5, 48, torch.bfloat16)
    leaves = [x.requires_grad_() for x in inputs]
    outputs = mix.ddlerp(*leaves)
    grads = [torch.ones_like(y) for y in outputs]
    for grad in grads:
        grad[1] = float("nan")
    torch.autograd.backward(outputs, grads)
    assert leaves[0].grad[[0, 2]].isfinite().all()
    assert leaves[1].grad[[0, 2]].isfinite().all()
    assert leaves[0].grad[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates_are_finite_and_nan_is_kept(dtype):
    y = torch.randn(1, 4, 64).to(dtype)
    gate = torch.tensor([-1e30, -90.0, 90.0, 1e18]).to(dtype).view(1, 4, 1).expand(1, 4, 64)
    weight, bias = torch.ones(64), torch.zeros(64)
    found = mix.gated_norm(y, gate, weight, bias, 2, EPS)
    exact = mix.gated_norm(y.double(), gate.double(), weight.double(), bias.double(), 2, EPS)
    assert found[0, 1].abs().max() < 1e-20
    assert relative_error(found[0, 2:], exact[0, 2:]) < 4e-3
    broken = torch.full((1, 1, 64), float("nan"), dtype=dtype)
    assert mix.gated_norm(y[:, :1], broken, weight, bias, 2, EPS).isnan().all()
    assert mix.relu_square(broken).isnan().all()


def kept_bytes(operator, *inputs: torch.Tensor) -> int:
    """Return the bytes that autograd keeps in addition to the given inputs."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        _outputs = operator(*inputs)
        return sum(size for where, size in kept.items() if where not in given)


def test_memory_kept_for_backward():
    B, T, C = 2, 30, 48
    rows = B * T
    for name, expected in {
        "ddlerp": 4 * rows * 5 * RANK,  # the low-rank activations
        "shift_lerp": 0,
        "decay": 4 * rows * RANK,
        "gated_norm": 0,
        "relu_square": 2 * rows * C,  # the output
    }.items():
        inputs = make_inputs(name, B, T, C, torch.bfloat16)
        inputs[0].requires_grad_()
        assert kept_bytes(form(name), *inputs) == expected, name


@pytest.mark.parametrize(
    ("name", "dtype", "trained"),
    [
        ("ddlerp", torch.bfloat16, True),
        ("ddlerp", torch.float32, False),
        ("shift_lerp", torch.float32, True),
        ("shift_lerp", torch.bfloat16, False),
        ("gated_norm", torch.bfloat16, True),
        ("relu_square", torch.bfloat16, True),
    ],
)
def test_opcheck(name, dtype, trained):
    """PyTorch's checks of schema, fake tensors, autograd registration and AOT dispatch."""
    inputs = make_inputs(name, 2, 5, 48, dtype, torch.float32)
    leaves = [x.requires_grad_(trained or i == 0) for i, x in enumerate(inputs)]
    torch.library.opcheck(getattr(torch.ops.rwkv_peft, name), (*leaves, *OPTIONS.get(name, ())))


def test_opcheck_backward():
    ops = torch.ops.rwkv_peft
    inputs = make_inputs("ddlerp", 2, 5, 48)
    *outputs, low_rank = ops.ddlerp(*inputs)
    torch.library.opcheck(ops.ddlerp_backward, (*inputs, low_rank, *outputs, True))
    x, last, maa = make_inputs("shift_lerp", 2, 5, 48)
    torch.library.opcheck(ops.shift_lerp_backward, (x, last, maa, x, x))
    torch.library.opcheck(ops.shift_lerp_backward, (None, None, maa, x, x))
    inputs = make_inputs("gated_norm", 2, 5, 48)
    torch.library.opcheck(ops.gated_norm_backward, (*inputs, 3, EPS, inputs[0], False))
    torch.library.opcheck(ops.relu_square_backward, (x, x.square()))


@pytest.mark.parametrize("name", ["ddlerp", "decay"])
def test_compiles_to_one_graph(name):
    """And gives the same results as eager mode."""
    inputs = [x.requires_grad_() for x in make_inputs(name, 2, 5, 48, torch.bfloat16)]
    eager = form(name)(*inputs)
    compiled = torch.compile(form(name), backend="aot_eager", fullgraph=True)(*inputs)
    compiled, eager = ((y,) if isinstance(y, torch.Tensor) else y for y in (compiled, eager))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(sum(y.sum() for y in ys), inputs) for ys in (compiled, eager)]
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 5e-3


def test_double_backward_is_refused():
    k = torch.ones(1, 2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(mix.relu_square(k).sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match=r"relu_square: .* no second derivative"):
        grad.sum().backward()
