"""The CUDA kernels' own source, run on the CPU with fibers for threads, against the float64 reference."""

import ctypes
import shutil
import subprocess
from ctypes import Structure, c_bool, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from rwkv_peft.ops.build import source_dir
from tests.ops.wkv6_cases import NAMES, assert_close, make_inputs, make_output_grads, reference_results

ELEMENTS = {torch.float32: 0, torch.float16: 2}


# As in cuda/wkv6/wkv6_sweeps.h.
class Launch(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "tokens", "heads", "head_size", "chunk")),
        ("element", c_int),
        ("stream", c_void_p),
    ]


class ValueSweep(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("read", "write", "in_", "decay", "u", "first_state")),
        *((name, c_void_p) for name in ("out", "last_state", "chunk_states")),
        ("backward_in_time", c_bool),
    ]


class KeySweep(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("r", "k", "v", "grad_y", "decay", "u", "chunk_states", "grad_last_state")),
        *((name, c_void_p) for name in ("grad_r", "grad_k", "grad_decay", "grad_u", "scratch")),
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
    return ctypes.CDLL(str(library))


def run_sweep(function, launch, sweep, falling, **tensors):
    """Fill the struct's pointers by name and run; a mistaken name raises, a strided tensor too."""
    for name, tensor in tensors.items():
        assert hasattr(sweep, name), name
        assert tensor.is_contiguous(), name
        setattr(sweep, name, tensor.data_ptr())
    function(ctypes.byref(launch), ctypes.byref(sweep), c_bool(falling))


def outputs_and_grads(kernels, inputs, output_grads, *, chunk, falling):
    """What wkv6_host.h does, with the kernels of `kernels`; every output starts as NaN."""
    r, k, v, w, u, state = inputs
    grad_y, grad_last_state = output_grads
    B, T, H, N = r.shape
    launch = Launch(B, T, H, N, chunk, ELEMENTS[r.dtype], None)

    def empty(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype)

    decay = torch.exp(-torch.exp(w))
    y, grad_r, grad_k, grad_v = (empty(B, T, H, N, dtype=r.dtype) for _ in range(4))
    last_state, grad_state = empty(B, H, N, N), empty(B, H, N, N)
    grad_decay, grad_u = empty(B, T, H, N), empty(B, H, N)
    chunk_states = empty(B, H, -(-T // chunk), N, N)
    shared = {"decay": decay, "u": u}

    run_sweep(
        kernels.value_sweep, launch, ValueSweep(backward_in_time=False), falling,
        read=r, write=k, in_=v, first_state=state, out=y, last_state=last_state, chunk_states=chunk_states, **shared,
    )  # fmt: skip
    keep_no_states = Launch(B, T, H, N, 0, ELEMENTS[r.dtype], None)
    run_sweep(
        kernels.value_sweep, keep_no_states, ValueSweep(backward_in_time=True), falling,
        read=k, write=r, in_=grad_y, first_state=grad_last_state, out=grad_v, last_state=grad_state, **shared,
    )  # fmt: skip
    run_sweep(
        kernels.key_sweep, launch, KeySweep(), falling,
        r=r, k=k, v=v, grad_y=grad_y, chunk_states=chunk_states, grad_last_state=grad_last_state,
        grad_r=grad_r, grad_k=grad_k, grad_decay=grad_decay, grad_u=grad_u, scratch=empty(B, H, chunk, N, N), **shared,
    )  # fmt: skip
    grad_w = -torch.exp(w - torch.exp(w)) * grad_decay
    results = (y, last_state, grad_r, grad_k, grad_v, grad_w, grad_u.sum(0), grad_state)
    return dict(zip(NAMES, results, strict=True))


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize(("T", "N", "chunk"), [(1, 32, 1), (7, 32, 32), (37, 32, 8), (33, 64, 32)])
def test_kernels_equal_reference(kernels, T, N, chunk, falling):
    inputs = make_inputs(B=2, T=T, H=2, N=N)
    grads = make_output_grads(inputs)
    found = outputs_and_grads(kernels, inputs, grads, chunk=chunk, falling=falling)
    assert_close(found, reference_results(inputs, grads), 2e-6)


def test_kernels_with_half_precision_rows(kernels):
    inputs = make_inputs(B=1, T=20, H=2, N=32, dtype=torch.float16)
    grads = make_output_grads(inputs)
    found = outputs_and_grads(kernels, inputs, grads, chunk=8, falling=False)
    assert_close(found, reference_results(inputs, grads), torch.finfo(torch.float16).eps / 2)


@pytest.mark.parametrize("w_value", [-20.0, 10.0, 1000.0])
def test_kernels_with_extreme_decays(kernels, w_value):
    inputs = make_inputs(B=1, T=20, H=1, N=32)
    inputs[3][:, 6] = w_value
    grads = make_output_grads(inputs)
    expected = reference_results(inputs, grads)
    expected["grad_w"] = expected["grad_w"].nan_to_num()  # inf * 0 in the reference at w = 1000; the limit is 0
    assert_close(outputs_and_grads(kernels, inputs, grads, chunk=8, falling=False), expected, 2e-6)


NEIGHBOUR_KERNEL = """
#include "wkv6_cuda_shim.h"
static int right = 0;
void reads_the_opposite_thread() {
  __shared__ int x[8];
  x[threadIdx.x] = 1;
  BARRIER;
  right += x[7 - threadIdx.x];
}
int main() {
  Block::run(8, false, reads_the_opposite_thread);
  return right;
}
"""


@pytest.mark.parametrize(("barrier", "right"), [("__syncthreads()", 8), ("", 4)])
def test_the_shim_tells_a_missing_barrier(tmp_path, barrier, right):
    """Otherwise the tests above would prove little about barriers."""
    source, program = tmp_path / "neighbour.cpp", tmp_path / "neighbour"
    source.write_text(NEIGHBOUR_KERNEL)
    include = f"-I{Path(__file__).parent}"
    subprocess.run(["g++", "-std=c++20", f"-DBARRIER={barrier}", include, source, "-o", program], check=True)
    assert subprocess.run([program], check=False).returncode == right
