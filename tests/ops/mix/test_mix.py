"""The compiled mixes, gated norm and squared ReLU against their definitions in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_peft.ops.mix import op as mix
from rwkv_peft.ops.mix import reference as mix_reference
from rwkv_peft.ops.mix.native import load_native
from tests.helpers import relative_error

PACKAGE_ROOT = Path(mix.__file__).parents[3]
EPS = 64e-5
RANK = 4
OPERATORS = ("ddlerp", "shift_lerp", "decay", "gated_norm", "relu_square")
OPTIONS = {"gated_norm": (3, EPS)}
SHAPES = [(1, 1, 48), (2, 7, 51), (3, 300, 33), (1, 513, 48)]
"""B, T, C: one token, odd sizes, sequences that end inside a chunk of 256 rows, a chunk of one row."""


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
    """An operator as a function of its tensors."""
    return lambda *tensors: getattr(module, name)(*tensors, *OPTIONS.get(name, ()))


def run(name: str, inputs: list[torch.Tensor], trained=None, module=mix) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of the inputs at the places `trained` (all) for a fixed gradient of the outputs."""
    leaves = [x.detach().requires_grad_(trained is None or i in trained) for i, x in enumerate(inputs)]
    outputs = form(name, module)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, grads)
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    return found | {f"grad {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}


@pytest.fixture(params=["best", "avx2", "plain"])
def level(request):
    """Every instruction set that this processor can run."""
    levels = torch.ops.rwkv_peft.mix_cpu_levels()
    wanted = levels[0] if request.param == "best" else request.param
    if wanted not in levels or (wanted == levels[0] and request.param != "best"):
        pytest.skip(f"{wanted}: not on this processor, or tested already as its best")
    before = torch.ops.rwkv_peft.mix_use_cpu_level(wanted)
    yield wanted
    torch.ops.rwkv_peft.mix_use_cpu_level(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_fp32_equals_the_definition(name, shape, level):
    inputs = make_inputs(name, *shape)
    exact, found = run(name, [x.double() for x in inputs], module=mix_reference), run(name, inputs)
    assert found.keys() == exact.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert relative_error(value, exact[key]) < 2e-6, key


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_bf16_is_no_worse_than_plain_operations(name, shape, parameter_dtype, level):
    """fp32 inside and one rounding at the end; squared ReLU's gradient also feels that its output was rounded."""
    inputs = make_inputs(name, *shape, torch.bfloat16, parameter_dtype)
    exact, found = run(name, [x.double() for x in inputs], module=mix_reference), run(name, inputs)
    plain = run(name, inputs, module=mix_reference)
    for key, value in found.items():
        assert value.dtype == plain[key].dtype, key
        one_rounding = 2.6e-3 if name == "relu_square" and key.startswith("grad") else 2.2e-3
        assert relative_error(value, exact[key]) < max(one_rounding, 1.1 * relative_error(plain[key], exact[key])), key


def test_bf16_is_rounded_to_even(level):
    """As torch rounds: means of two bf16 numbers often lie in the middle between two."""
    x, last, _ = make_inputs("shift_lerp", 2, 41, 50, torch.bfloat16)
    half = torch.full((2, 50), 0.5)
    for found, exact in zip(
        mix.shift_lerp(x, last, half), mix_reference.shift_lerp(x.float(), last.float(), half), strict=True
    ):
        assert torch.equal(found, exact.bfloat16())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_frozen_parameters_change_no_other_gradient(name, dtype):
    inputs = make_inputs(name, 2, 9, 48, dtype)
    both, alone = run(name, inputs), run(name, inputs, trained={0})
    assert [key for key in alone if key.startswith("grad")] == ["grad 0"]
    assert torch.equal(both["grad 0"], alone["grad 0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_overflow_stays_in_its_sequence(dtype):
    """A sequence of infinities and NaN leaves the gradients of its neighbours in the batch alone."""
    inputs = make_inputs("ddlerp", 3, 5, 48, dtype)
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
def test_extreme_gates_are_finite_and_nan_stays(dtype):
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
    """Bytes that autograd keeps beside the given inputs' own."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        _outputs = operator(*inputs)
        return sum(size for where, size in kept.items() if where not in given)


def test_what_is_kept_for_the_backward():
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


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddlerp", "shift_lerp", "gated_norm", "relu_square"])
def test_opcheck(name, dtype, trained):
    """Schema, fake tensors, autograd registration and AOT dispatch, as PyTorch checks them."""
    inputs = make_inputs(name, 2, 5, 48, dtype, torch.float32)
    leaves = [x.requires_grad_(trained or i == 0) for i, x in enumerate(inputs)]
    torch.library.opcheck(getattr(torch.ops.rwkv_peft, name), (*leaves, *OPTIONS.get(name, ())))


@pytest.mark.parametrize("trained", [True, False])
def test_opcheck_backward(trained):
    ops = torch.ops.rwkv_peft
    inputs = make_inputs("ddlerp", 2, 5, 48)
    *outputs, low_rank = ops.ddlerp(*inputs)
    torch.library.opcheck(ops.ddlerp_backward, (*inputs, low_rank, *outputs, trained))
    x, last, maa = make_inputs("shift_lerp", 2, 5, 48)
    kept = (x, last) if trained else (None, None)
    torch.library.opcheck(ops.shift_lerp_backward, (*kept, maa, x, x))
    inputs = make_inputs("gated_norm", 2, 5, 48)
    torch.library.opcheck(ops.gated_norm_backward, (*inputs, 3, EPS, inputs[0], trained))
    torch.library.opcheck(ops.relu_square_backward, (x, x.square()))


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_compile(name):
    """One graph, the same numbers."""
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


WITHOUT_COMPILER = """
import torch
from rwkv_peft.ops.mix.op import relu_square

for _ in range(2):
    print(relu_square(torch.tensor([-1.0, 3.0])).tolist())
"""


def test_without_a_compiler(tmp_path):
    """Everything works, and one line says what is missing."""
    env = {"CXX": "/no/such/compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE_ROOT)}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[0.0, 9.0]"] * 2
    assert result.stderr.count("mixes on cpu: slower torch operations, as the compiled ones are missing: no C++") == 1
