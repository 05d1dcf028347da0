"""The operator as PyTorch and its callers see it: registration, choice of backend, errors."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_peft.errors import UserError
from rwkv_peft.ops.wkv6 import op as wkv6_module
from rwkv_peft.ops.wkv6.native import CHUNK, load_native
from rwkv_peft.ops.wkv6.op import active_backend, wkv6
from tests.ops.wkv6.wkv6_cases import NAMES, make_inputs, make_output_grads

PACKAGE_ROOT = Path(wkv6_module.__file__).parents[3]


@pytest.fixture
def native_op():
    assert load_native("cpu") is None
    return torch.ops.rwkv_peft


@pytest.fixture
def fresh_choice():
    """Forget which backend `auto` took, before and after."""
    wkv6_module._automatic.cache_clear()
    yield
    wkv6_module._automatic.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(native_op, dtype):
    """Schema, fake tensors, autograd registration and AOT dispatch, as PyTorch checks them."""
    inputs = make_inputs(B=2, T=5, H=2, N=4, dtype=dtype)
    trained = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(native_op.wkv6, (*trained, 2))


def test_opcheck_backward(native_op):
    inputs = make_inputs(B=2, T=5, H=2, N=4)
    *_, chunk_states = native_op.wkv6(*inputs, 2)
    torch.library.opcheck(native_op.wkv6_backward, (*inputs[:5], chunk_states, *make_output_grads(inputs), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_step(native_op, dtype):
    torch.library.opcheck(native_op.wkv6_step, make_inputs(B=2, T=1, H=2, N=4, dtype=dtype))


def test_a_compiled_function_equals_the_eager_one(native_op):
    """One graph, no break, forward and backward."""

    def loss(*inputs):
        y, state = wkv6(*inputs, backend="native")
        return (y.float() ** 2).sum() + state.sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaves = [x.requires_grad_() for x in make_inputs(B=1, T=9, H=2, N=16)]
    expected, found = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    for name, one, other in zip(NAMES[2:], found, expected, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_only_chunk_states_are_kept_for_the_backward(native_op):
    B, T, H, N = 2, 3 * CHUNK["cpu"] + 1, 2, 32
    leaves = [x.requires_grad_() for x in make_inputs(B, T, H, N)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        wkv6(*leaves, backend="native")
    rows = [torch.Size((B, T, H, N))] * 4
    assert sorted(kept) == sorted([*rows, torch.Size((H, N)), torch.Size((B, H, 4, N, N))])


class ChunkRecorder(TorchDispatchMode):
    """Notes the `chunk` of every call of the op that reaches the kernels."""

    def __init__(self):
        super().__init__()
        self.chunks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.rwkv_peft.wkv6.default:
            self.chunks.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_kept_states_are_not_differentiable(native_op):
    leaves = [x.requires_grad_() for x in make_inputs(B=1, T=5, H=1, N=4)]
    assert [x.requires_grad for x in native_op.wkv6(*leaves, 2)] == [True, True, False]


def test_states_are_kept_for_gradients_only(native_op):
    inputs = make_inputs(B=1, T=CHUNK["cpu"] + 1, H=1, N=32)
    with ChunkRecorder() as recorder:
        wkv6(*inputs, backend="native")
        for x in inputs:
            x.requires_grad_()
        with torch.no_grad():
            wkv6(*inputs, backend="native")
        wkv6(*inputs, backend="native")
    assert recorder.chunks == [0, 0, CHUNK["cpu"]]


def test_double_backward_is_refused(native_op):
    """The backward has no derivative of its own: an error, not a gradient that is silently zero."""
    leaves = [x.requires_grad_() for x in make_inputs(B=1, T=3, H=1, N=32)]
    y, _ = wkv6(*leaves, backend="native")
    (grad_r,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad_r.sum().backward()


def test_auto_takes_the_compiled_op_and_says_so_once(fresh_choice, caplog):
    inputs = make_inputs(B=1, T=3, H=1, N=32)
    with caplog.at_level(logging.INFO, logger="rwkv_peft"):
        wkv6(*inputs)
        wkv6(*inputs)
    assert [record.getMessage() for record in caplog.records] == ["wkv6 on cpu: native, the compiled op is built"]
    assert active_backend("cpu").backend == "native"


def test_auto_takes_the_reference_in_float64():
    inputs = [x.double() for x in make_inputs(B=1, T=3, H=1, N=32)]
    y, state = wkv6(*inputs)
    assert y.dtype == state.dtype == torch.float64
    assert torch.equal(y, wkv6(*inputs, backend="reference")[0])
    with pytest.raises(ValueError, match="native has no float64"):
        wkv6(*inputs, backend="native")


WITHOUT_COMPILER = """
import torch
from rwkv_peft.errors import UserError
from rwkv_peft.ops.wkv6.op import active_backend, wkv6

r = torch.ones(1, 2, 1, 4)
for _ in range(2):
    wkv6(r, r, r, r, torch.ones(1, 4))
print(*active_backend("cpu"), sep="|")
try:
    wkv6(r, r, r, r, torch.ones(1, 4), backend="native")
except UserError as error:
    print(error)
"""


def test_without_a_compiler(tmp_path):
    """auto falls back and says so once; native explains what is missing and what else there is."""
    env = {"CXX": "/no/such/compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE_ROOT)}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    reason = "no C++ compiler: '/no/such/compiler' is not on PATH"
    choice, refusal = result.stdout.splitlines()
    assert choice.startswith(f"torch|{reason}")
    assert refusal.startswith("wkv6 backend native: the compiled op cannot be had on cpu: " + reason)
    assert "take backend torch" in refusal
    assert result.stderr.count(f"wkv6 on cpu: the slower torch backend, as the native one is missing: {reason}") == 1


def test_native_on_a_device_without_an_op():
    with pytest.raises(UserError, match="no compiled op for meta devices"):
        active_backend("meta", "native")


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 2, 4), r"r must be \(B, T, H, N\).*found \(3, 2, 4\)"),
        (0, torch.zeros(1, 0, 2, 4), r"r must be .*found \(1, 0, 2, 4\)"),
        (0, torch.zeros(1, 3, 2, 4, dtype=torch.int32), "r must be float32.*found torch.int32"),
        (1, torch.zeros(1, 3, 2, 5), r"k must be \(1, 3, 2, 4\) beside r \(1, 3, 2, 4\); found \(1, 3, 2, 5\)"),
        (2, torch.zeros(1, 3, 2, 4).bfloat16(), "v must be torch.float32 beside r.*found torch.bfloat16"),
        (3, torch.zeros(1, 4, 2, 4), r"w must be \(1, 3, 2, 4\)"),
        (3, torch.zeros(1, 3, 2, 4).double(), "w must be torch.float32"),
        (4, torch.zeros(4, 2), r"u must be \(2, 4\)"),
        (5, torch.zeros(2, 4, 4), r"state must be \(1, 2, 4, 4\)"),
        (5, torch.zeros(1, 2, 4, 4).bfloat16(), "state must be torch.float32"),
        (5, torch.zeros(1, 2, 4, 4, device="meta"), "state is on meta, r on cpu"),
    ],
)
def test_a_wrong_argument_is_named(position, wrong, message):
    inputs = [*make_inputs(B=1, T=3, H=2, N=4)]
    inputs[position] = wrong
    with pytest.raises(ValueError, match=message):
        wkv6(*inputs)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'fast' is not one of auto, native, fla, torch, reference"):
        wkv6(*make_inputs(B=1, T=3, H=2, N=4), backend="fast")
