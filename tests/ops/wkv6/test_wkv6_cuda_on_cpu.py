"""The CUDA kernels' own source, run on the CPU with fibers for threads, against the float64 reference."""

import ctypes
import shutil
import subprocess
from ctypes import Structure, c_bool, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from rwkv_peft.ops.build import source_dir
from rwkv_peft.ops.wkv6.op import cleared
from tests.ops.wkv6.wkv6_cases import (
    NAMES,
    assert_close,
    make_inputs,
    make_output_grads,
    reference_results,
    relative_error,
)

CHUNK = 64
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROWS = ("y", "grad_r", "grad_k", "grad_v")  # in the element type; the rest is fp32


# As in cuda/wkv6/wkv6_call.h.
class Launch(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "tokens", "heads", "head_size", "chunk")),
        ("element", c_int),
        ("stream", c_void_p),
    ]


class Forward(Structure):
    _fields_ = [
        (name, c_void_p)
        for name in ("r", "k", "v", "w", "u", "first_state", "y", "last_state", "chunk_states", "scratch")
    ]


class Backward(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("r", "k", "v", "w", "u", "chunk_states", "grad_y", "grad_last_state")),
        *((name, c_void_p) for name in ("grad_r", "grad_k", "grad_v", "grad_w", "grad_u", "grad_first_state")),
        ("scratch", c_void_p),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    source = Path(__file__).with_name("wkv6_cuda_on_cpu.cpp")
    flags = ["-O2", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, f"-I{source_dir() / 'wkv6'}", source, "-o", library], check=True)
    kernels = ctypes.CDLL(str(library))
    kernels.forward_scratch_floats.restype = kernels.backward_scratch_floats.restype = c_int64
    return kernels


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def run_pass(function, launch, pointers, **tensors):
    """Fill the struct's pointers by name and run; a name too many or too few raises, a strided tensor too."""
    assert set(tensors) == {name for name, _ in pointers._fields_}
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), name
        setattr(pointers, name, tensor.data_ptr())
    function(ctypes.byref(launch), ctypes.byref(pointers))


def run_forward(kernels, inputs, *, chunk=CHUNK):
    """(y, last_state, chunk_states)."""
    r, k, v, w, u, state = inputs
    B, T, H, N = r.shape
    launch = Launch(B, T, H, N, chunk, ELEMENTS[r.dtype], None)
    y, last_state = poisoned(B, T, H, N, dtype=r.dtype), poisoned(B, H, N, N)
    chunk_states = poisoned(B, H, -(-T // chunk) if chunk else 0, N, N)
    scratch = poisoned(kernels.forward_scratch_floats(ctypes.byref(launch)))
    run_pass(
        kernels.forward, launch, Forward(), r=r, k=k, v=v, w=w, u=u, first_state=state,
        y=y, last_state=last_state, chunk_states=chunk_states, scratch=scratch,
    )  # fmt: skip
    return y, last_state, chunk_states


def run_backward(kernels, inputs, chunk_states, output_grads, *, chunk=CHUNK):
    """(grad_r, grad_k, grad_v, grad_w, grad_u, grad_first_state)."""
    r, k, v, w, u, _ = inputs
    grad_y, grad_last_state = output_grads
    B, T, H, N = r.shape
    launch = Launch(B, T, H, N, chunk, ELEMENTS[r.dtype], None)
    grad_r, grad_k, grad_v = (poisoned(B, T, H, N, dtype=r.dtype) for _ in range(3))
    grad_w, grad_u, grad_first_state = poisoned(B, T, H, N), poisoned(B, H, N), poisoned(B, H, N, N)
    scratch = poisoned(kernels.backward_scratch_floats(ctypes.byref(launch)))
    run_pass(
        kernels.backward, launch, Backward(), r=r, k=k, v=v, w=w, u=u, chunk_states=chunk_states,
        grad_y=grad_y, grad_last_state=grad_last_state, grad_r=grad_r, grad_k=grad_k, grad_v=grad_v,
        grad_w=grad_w, grad_u=grad_u, grad_first_state=grad_first_state, scratch=scratch,
    )  # fmt: skip
    return grad_r, grad_k, grad_v, grad_w, grad_u.sum(0), grad_first_state


def outputs_and_grads(kernels, inputs, output_grads, *, chunk=CHUNK, falling=False):
    """What wkv6_host.h does, with the kernels of `kernels`; every output and all scratch starts as NaN."""
    kernels.set_order(c_bool(falling))
    y, last_state, chunk_states = run_forward(kernels, inputs, chunk=chunk)
    grads = run_backward(kernels, inputs, chunk_states, output_grads, chunk=chunk)
    return dict(zip(NAMES, (y, last_state, *grads), strict=True))


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize(
    ("T", "N"), [(1, 32), (1, 128), (16, 64), (17, 32), (63, 64), (64, 64), (65, 64), (65, 128), (200, 32), (200, 64)]
)
def test_kernels_equal_reference(kernels, T, N, falling):
    inputs = make_inputs(B=2, T=T, H=2, N=N)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads, falling=falling), reference_results(inputs, grads), 1e-6)


@pytest.mark.parametrize("N", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_with_half_precision_rows(kernels, dtype, N):
    """What is stored in fp32 is as exact as with fp32 rows; a row has the error of its one rounding."""
    inputs = make_inputs(B=1, T=75, H=2, N=N, dtype=dtype)
    grads = make_output_grads(inputs)
    found, expected = outputs_and_grads(kernels, inputs, grads), reference_results(inputs, grads)
    rows = [name for name in NAMES if name in ROWS]
    assert all(found[name].dtype == dtype for name in rows)
    assert_close(found, {name: expected[name] for name in rows}, torch.finfo(dtype).eps / 4)
    assert_close(found, {name: expected[name] for name in NAMES if name not in rows}, 1e-6)


def test_the_order_of_threads_and_blocks_does_not_matter(kernels):
    """Bitwise: no sum depends on who comes first."""
    inputs = make_inputs(B=2, T=130, H=2, N=64)
    grads = make_output_grads(inputs)
    rising, falling = (outputs_and_grads(kernels, inputs, grads, falling=falling) for falling in (False, True))
    assert all(torch.equal(rising[name], falling[name]) for name in NAMES)


def test_forward_that_keeps_no_states(kernels):
    """Bitwise the one that keeps them."""
    inputs = make_inputs(B=2, T=130, H=2, N=64)
    kernels.set_order(c_bool(False))
    kept, unkept = run_forward(kernels, inputs), run_forward(kernels, inputs, chunk=0)
    assert torch.equal(kept[0], unkept[0])
    assert torch.equal(kept[1], unkept[1])


@pytest.mark.parametrize("chunk", [1, 15, 32, 200])
def test_chunks_of_any_size(kernels, chunk):
    inputs = make_inputs(B=1, T=75, H=2, N=32)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads, chunk=chunk), reference_results(inputs, grads), 1e-6)


@pytest.mark.parametrize("broken", range(4))
def test_a_nan_is_not_hidden(kernels, broken):
    """One in r, k, v or w reaches the gradient of its token, and leaves the tokens before it alone in y."""
    inputs = make_inputs(B=1, T=40, H=1, N=32)
    inputs[broken][0, 20, 0, 3] = float("nan")
    found = outputs_and_grads(kernels, inputs, make_output_grads(inputs))
    assert found["y"][:, 21 if broken == 3 else 20 :].isnan().any()
    assert found["y"][:, :20].isfinite().all()
    assert found["grad_w"].isnan().any()


def test_decays_of_a_fresh_model_over_many_tokens(kernels):
    """w of model/init.py, one for all tokens: a decay's rounding error then adds up in the same direction."""
    inputs = list(make_inputs(B=1, T=2048, H=1, N=64))
    inputs[3] = (-6 + 5 * torch.linspace(0, 1, 64)).expand(1, 2048, 1, 64).contiguous()
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads), reference_results(inputs, grads), 1e-6)


@pytest.mark.parametrize("w_value", [-1e4, -20.0, 5.0, 12.0, 1e4])
def test_extreme_decays(kernels, w_value):
    """At all tokens of some channels, and in the midst of usual ones."""
    inputs = make_inputs(B=1, T=140, H=1, N=32)
    inputs[3][..., :8] = w_value
    inputs[3][:, 5::7] = w_value
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    expected["grad_w"] = expected["grad_w"].nan_to_num()  # inf * 0 in the reference at w = 1e4; the limit is 0
    assert_close(outputs_and_grads(kernels, inputs, grads), expected, 2e-6)


@pytest.mark.parametrize("w_value", [5.0, 12.0, 1e4])
def test_a_reset_separates_two_texts(kernels, w_value):
    """k = 0 and decay 0 at token 37: what follows is bitwise what it is with other tokens before."""
    r, k, v, w, u, state = make_inputs(B=2, T=100, H=1, N=64)
    k[:, 37], w[:, 37] = 0.0, w_value
    for x in (r, k, v, w):
        x[1, 38:] = x[0, 38:]
    kernels.set_order(c_bool(False))
    y, last_state, _ = run_forward(kernels, (r, k, v, w, u, state))
    assert not torch.equal(y[0, 37], y[1, 37])
    assert torch.equal(y[0, 38:], y[1, 38:])
    assert torch.equal(last_state[0], last_state[1])


@pytest.mark.parametrize("chunk", [16, CHUNK])
def test_many_texts_in_a_row(kernels, chunk):
    """Resets in the midst of chunks, at both their ends, and at one token after the other."""
    r, k, v, w, u, state = make_inputs(B=2, T=140, H=1, N=32)
    starts = torch.zeros(2, 140, dtype=torch.bool)
    starts[0, [0, 1, 5, 16, 17, 33, 63, 64, 65, 100, 128, 129, 139]] = True
    starts[1, 20:40] = True
    k, w, state = cleared(k, w, state, starts)
    inputs = (r, k, v, w, u, state)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads, chunk=chunk), reference_results(inputs, grads), 1e-6)


def test_split_text_equals_one_pass(kernels):
    """The state carried from the first part to the second, its gradient back."""
    inputs = make_inputs(B=1, T=150, H=2, N=32)
    grad_y, grad_last_state = make_output_grads(inputs)
    *rows, u, state = inputs
    first, second = ([x[:, part].contiguous() for x in rows] for part in (slice(0, 70), slice(70, 150)))
    kernels.set_order(c_bool(False))
    y1, middle, states1 = run_forward(kernels, (*first, u, state))
    y2, last, states2 = run_forward(kernels, (*second, u, middle))
    grads2 = run_backward(kernels, (*second, u, middle), states2, (grad_y[:, 70:].contiguous(), grad_last_state))
    grads1 = run_backward(kernels, (*first, u, state), states1, (grad_y[:, :70].contiguous(), grads2[5]))
    joined = [torch.cat(pair, dim=1) for pair in zip(grads1[:4], grads2[:4], strict=True)]
    found = (torch.cat((y1, y2), dim=1), last, *joined, grads1[4] + grads2[4], grads1[5])
    expected = reference_results(inputs, (grad_y, grad_last_state))
    assert_close(dict(zip(NAMES, found, strict=True)), expected, 1e-6)


def barriers():
    """ "file:line" of each barrier of the kernels."""
    found = [
        f"{path.name}:{number}"
        for path in sorted((source_dir() / "wkv6").glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "__syncthreads();" in line
    ]
    assert found  # or the test below would be skipped
    return found


@pytest.mark.parametrize("barrier", barriers())
def test_every_barrier_is_needed(kernels, barrier):
    """Without it, some order of the threads gives wrong numbers. So the tests above prove that none is missing."""
    inputs = make_inputs(B=1, T=100, H=2, N=32)
    grads = make_output_grads(inputs)
    right = outputs_and_grads(kernels, inputs, grads)
    kernels.set_missing_barrier(barrier.encode())
    try:
        wrong = [outputs_and_grads(kernels, inputs, grads, falling=falling) for falling in (False, True)]
    finally:
        kernels.set_missing_barrier(b"")
    assert any(not relative_error(found[name], right[name]) < 1e-3 for found in wrong for name in NAMES)  # or NaN
    assert all(torch.equal(outputs_and_grads(kernels, inputs, grads)[name], right[name]) for name in NAMES)
