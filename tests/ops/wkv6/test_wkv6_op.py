"""The WKV6 operator: registration with PyTorch, choice of the backend, and errors."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_peft.errors import UserError
from rwkv_peft.ops.wkv6 import op as wkv6_module
from rwkv_peft.ops.wkv6.native import CHUNK, load_native
from rwkv_peft.ops.wkv6.op import active_backend, wkv6
from tests.ops.wkv6.wkv6_cases import NAMES, make_inputs, make_output_grads


@pytest.fixture
def native_op():
    assert load_native("cpu") is None
    return torch.ops.rwkv_peft


@pytest.fixture
def fresh_choice():
    """Clear the cached choice of `auto` before and after the test."""
    wkv6_module._automatic.cache_clear()
    yield
    wkv6_module._automatic.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(native_op, dtype):
    """PyTorch's checks of schema, fake tensors, autograd registration and AOT dispatch."""
    inputs = make_inputs(B=2, T=5, H=2, N=4, dtype=dtype)
    trained = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(native_op.wkv6, (*trained, 2))


def test_opcheck_backward(native_op):
    inputs = make_inputs(B=2, T=5, H=2, N=4)
    *_, chunk_states = native_op.wkv6(*inputs, 2)
    torch.library.opcheck(native_op.wkv6_backward, (*inputs[:5], chunk_states, *make_output_grads(inputs), 2))


def test_opcheck_step(native_op):
    torch.library.opcheck(native_op.wkv6_step, make_inputs(B=2, T=1, H=2, N=4, dtype=torch.bfloat16))


def test_a_compiled_function_equals_the_eager_one(native_op):
    """Compiles to one graph without breaks, forward and backward."""

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
    """Records the `chunk` of every call that reaches the kernels."""

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
    """The backward has no derivative: an error, not a zero gradient."""
    leaves = [x.requires_grad_() for x in make_inputs(B=1, T=3, H=1, N=32)]
    y, _ = wkv6(*leaves, backend="native")
    (grad_r,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad_r.sum().backward()


def test_auto_uses_the_compiled_operator_and_logs_it_once(fresh_choice, caplog):
    inputs = make_inputs(B=1, T=3, H=1, N=32)
    with caplog.at_level(logging.INFO, logger="rwkv_peft"):
        wkv6(*inputs)
        wkv6(*inputs)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["wkv6 on cpu: native, the compiled operator is available"]
    assert active_backend("cpu").backend == "native"


def test_auto_uses_the_reference_for_float64():
    inputs = [x.double() for x in make_inputs(B=1, T=3, H=1, N=32)]
    y, state = wkv6(*inputs)
    assert y.dtype == state.dtype == torch.float64
    assert torch.equal(y, wkv6(*inputs, backend="reference")[0])
    with pytest.raises(ValueError, match="native does not support float64"):
        wkv6(*inputs, backend="native")


def test_native_on_a_device_without_an_op():
    with pytest.raises(UserError, match="no compiled operator for meta devices"):
        active_backend("meta", "native")


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, 2, 4), r"r must be \(B, T, H, N\).*found \(3, 2, 4\)"),
        (0, torch.zeros(1, 0, 2, 4), r"r must be .*found \(1, 0, 2, 4\)"),
        (0, torch.zeros(1, 3, 2, 4, dtype=torch.int32), "r must be float32.*found torch.int32"),
        (1, torch.zeros(1, 3, 2, 5), r"k must be \(1, 3, 2, 4\) to match r \(1, 3, 2, 4\); found \(1, 3, 2, 5\)"),
        (2, torch.zeros(1, 3, 2, 4).bfloat16(), "v must be torch.float32 if r is torch.float32; found torch.bfloat16"),
        (3, torch.zeros(1, 4, 2, 4), r"w must be \(1, 3, 2, 4\)"),
        (4, torch.zeros(4, 2), r"u must be \(2, 4\)"),
        (5, torch.zeros(2, 4, 4), r"state must be \(1, 2, 4, 4\)"),
        (5, torch.zeros(1, 2, 4, 4, device="meta"), "state must be on the device of r, cpu; found meta"),
    ],
)
def test_the_error_names_a_wrong_argument(position, wrong, message):
    inputs = [*make_inputs(B=1, T=3, H=2, N=4)]
    inputs[position] = wrong
    with pytest.raises(ValueError, match=message):
        wkv6(*inputs)


def test_the_error_lists_the_backends():
    with pytest.raises(ValueError, match="backend must be one of auto, native, fla, torch, reference; found 'fast'"):
        wkv6(*make_inputs(B=1, T=3, H=2, N=4), backend="fast")
