"""The source of the CUDA kernels, run on the CPU with fibers as threads and compared with the float64 reference."""

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
ROWS = ("y", "grad_r", "grad_k", "grad_v")  # in the element type; the others are fp32


# The structs of cuda/wkv6/wkv6_call.h.
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
    subprocess.run([compiler, *flags, f"-I{source_dir() / 'wkv6' / 'gpu'}", source, "-o", library], check=True)
    kernels = ctypes.CDLL(str(library))
    kernels.forward_scratch_floats.restype = kernels.backward_scratch_floats.restype = c_int64
    return kernels


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def run_pass(function, launch, pointers, **tensors):
    """Set the struct's pointers by name and run. Missing names, extra names and strided tensors raise an error."""
    assert set(tensors) == {name for name, _ in pointers._fields_}
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), name
        setattr(pointers, name, tensor.data_ptr())
    function(ctypes.byref(launch), ctypes.byref(pointers))


def run_forward(kernels, inputs, *, chunk=CHUNK):
    """Return (y, last_state, chunk_states)."""
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
    """Return (grad_r, grad_k, grad_v, grad_w, grad_u, grad_first_state)."""
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
    """Do the same as wkv6_host.h with `kernels`. All outputs and scratch memory are NaN before."""
    kernels.set_order(c_bool(falling))
    y, last_state, chunk_states = run_forward(kernels, inputs, chunk=chunk)
    grads = run_backward(kernels, inputs, chunk_states, output_grads, chunk=chunk)
    return dict(zip(NAMES, (y, last_state, *grads), strict=True))


@pytest.mark.parametrize(
    ("T", "N", "falling"),
    [(1, 32, False), (16, 64, True), (17, 32, True), (64, 64, False), (65, 128, True), (200, 64, False)],
)
def test_kernels_equal_reference(kernels, T, N, falling):
    inputs = make_inputs(B=2, T=T, H=2, N=N)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads, falling=falling), reference_results(inputs, grads), 1e-6)


@pytest.mark.parametrize(("dtype", "N"), [(torch.bfloat16, 32), (torch.float16, 64), (torch.bfloat16, 128)])
def test_kernels_with_half_precision_rows(kernels, dtype, N):
    """Results in fp32 are as precise as with fp32 rows. Results in half precision are rounded once."""
    inputs = make_inputs(B=1, T=75, H=2, N=N, dtype=dtype)
    grads = make_output_grads(inputs)
    found, expected = outputs_and_grads(kernels, inputs, grads), reference_results(inputs, grads)
    rows = [name for name in NAMES if name in ROWS]
    assert all(found[name].dtype == dtype for name in rows)
    assert_close(found, {name: expected[name] for name in rows}, torch.finfo(dtype).eps / 4)
    assert_close(found, {name: expected[name] for name in NAMES if name not in rows}, 1e-6)


def test_the_order_of_threads_and_blocks_does_not_matter(kernels):
    """The results are bitwise equal."""
    inputs = make_inputs(B=2, T=130, H=2, N=64)
    grads = make_output_grads(inputs)
    rising, falling = (outputs_and_grads(kernels, inputs, grads, falling=falling) for falling in (False, True))
    assert all(torch.equal(rising[name], falling[name]) for name in NAMES)


def test_forward_without_saved_states(kernels):
    """The results are bitwise equal to those with saved states."""
    inputs = make_inputs(B=2, T=130, H=2, N=64)
    kernels.set_order(c_bool(False))
    kept, unkept = run_forward(kernels, inputs), run_forward(kernels, inputs, chunk=0)
    assert torch.equal(kept[0], unkept[0])
    assert torch.equal(kept[1], unkept[1])


@pytest.mark.parametrize("chunk", [1, 15, 200])
def test_chunks_of_any_size(kernels, chunk):
    inputs = make_inputs(B=1, T=75, H=2, N=32)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads, chunk=chunk), reference_results(inputs, grads), 1e-6)


def test_nan_is_not_hidden(kernels):
    """NaN in r, k, v or w reaches the gradient of its token, and does not change y of the tokens before it."""
    for broken in range(4):
        inputs = make_inputs(B=1, T=40, H=1, N=32)
        inputs[broken][0, 20, 0, 3] = float("nan")
        found = outputs_and_grads(kernels, inputs, make_output_grads(inputs))
        assert found["y"][:, 21 if broken == 3 else 20 :].isnan().any(), broken
        assert found["y"][:, :20].isfinite().all(), broken
        assert found["grad_w"].isnan().any(), broken


def test_decays_of_a_new_model_over_many_tokens(kernels):
    """With the constant w of model/init.py, the rounding error of a decay would accumulate in one direction."""
    inputs = list(make_inputs(B=1, T=2048, H=1, N=64))
    inputs[3] = (-6 + 5 * torch.linspace(0, 1, 64)).expand(1, 2048, 1, 64).contiguous()
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads), reference_results(inputs, grads), 1e-6)


def test_extreme_decays(kernels):
    """At all tokens of some channels, and between tokens with ordinary decays."""
    w_values = torch.tensor([-1e4, -20.0, 5.0, 12.0, 1e4]).view(5, 1, 1, 1)
    inputs = make_inputs(B=5, T=140, H=1, N=32)  # one value per sequence
    inputs[3][..., :8] = w_values
    inputs[3][:, 5::7] = w_values
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    expected["grad_w"] = expected["grad_w"].nan_to_num()  # inf * 0 in the reference at w = 1e4; the limit is 0
    assert_close(outputs_and_grads(kernels, inputs, grads), expected, 2e-6)


@pytest.mark.parametrize("w_value", [5.0, 1e4])
def test_a_reset_separates_two_texts(kernels, w_value):
    """With k = 0 and decay 0 at token 37, later results do not depend on earlier tokens in any bit."""
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
def test_many_texts_in_one_row(kernels, chunk):
    """Resets inside chunks, at both ends of chunks, and at consecutive tokens."""
    r, k, v, w, u, state = make_inputs(B=2, T=140, H=1, N=32)
    starts = torch.zeros(2, 140, dtype=torch.bool)
    starts[0, [0, 1, 5, 16, 17, 33, 63, 64, 65, 100, 128, 129, 139]] = True
    starts[1, 20:40] = True
    k, w, state = cleared(k, w, state, starts)
    inputs = (r, k, v, w, u, state)
    grads = make_output_grads(inputs)
    assert_close(outputs_and_grads(kernels, inputs, grads, chunk=chunk), reference_results(inputs, grads), 1e-6)


def test_split_text_equals_one_pass(kernels):
    """The state is passed from the first part to the second, and its gradient back."""
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
    """Return "file:line" of each barrier of the kernels."""
    return [
        f"{path.name}:{number}"
        for path in sorted((source_dir() / "wkv6" / "gpu").glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "__syncthreads();" in line
    ]


def test_every_barrier_is_needed(kernels):
    """Without it, at least one order of the threads gives wrong results. The tests above would notice a missing one."""
    inputs = make_inputs(B=1, T=100, H=2, N=32)
    grads = make_output_grads(inputs)
    right = outputs_and_grads(kernels, inputs, grads)
    assert len(barriers()) == 11
    for barrier in barriers():
        kernels.set_missing_barrier(barrier.encode())
        try:
            wrong = [outputs_and_grads(kernels, inputs, grads, falling=falling) for falling in (False, True)]
        finally:
            kernels.set_missing_barrier(b"")
        errors = [relative_error(found[name], right[name]) for found in wrong for name in NAMES]
        assert any(not error < 1e-3 for error in errors), barrier  # or NaN
    assert all(torch.equal(outputs_and_grads(kernels, inputs, grads)[name], right[name]) for name in NAMES)
