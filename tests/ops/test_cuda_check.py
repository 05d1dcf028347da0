"""`make cuda-check`: reading the report of ptxas, and detecting real register spills."""

import re

import pytest

from rwkv_peft.ops import build, cuda_check
from rwkv_peft.ops.cuda_check import Kernel, complaints, read_report, table

# Output of nvcc 13.0.88 -O3 -arch=sm_80 -Xptxas -v, without times: a kernel that spills, a kernel that does not, and a
# kernel that calls a function with a local array.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN40_GLOBAL__N__1e04a911_8_spill_cu__Z3farfi7pressedILi64EfEEvPT0_' for 'sm_80'
ptxas info    : Function properties for _ZN40_GLOBAL__N__1e04a911_8_spill_cu__Z3farfi7pressedILi64EfEEvPT0_
    40 bytes stack frame, 44 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 40 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z7indexedPfPKi' for 'sm_80'
ptxas info    : Function properties for _Z7indexedPfPKi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5callsPfi' for 'sm_80'
ptxas info    : Function properties for _Z5callsPfi
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers, 32 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Function properties for _Z3farfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas warning : Value of threads per SM for entry _Z5callsPfi is out of range. .minnctapersm will be ignored
"""  # noqa: E501

# The output for sm_120 and a kernel with shared memory.
SHARED_REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9rwkv_peft16key_sweep_kernelILi64EfEEvNS_6LaunchENS_8KeySweepE' for 'sm_120'
ptxas info    : Function properties for _ZN9rwkv_peft16key_sweep_kernelILi64EfEEvNS_6LaunchENS_8KeySweepE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 166 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 68.865 ms
"""  # noqa: E501

CLEAN = "__global__ void clean(float* x) { x[threadIdx.x] *= 2; }\n"
# 64 values in the 32 registers per thread that two blocks of 1024 threads have on sm_80; an array indexed at run time.
SPILLING = """
template <int N>
__global__ void __launch_bounds__(1024, 2) pressed(float* x) {
  float a[N];
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = a[N - 1 - i] * a[i];
}
template __global__ void pressed<64>(float*);

__global__ void indexed(float* x, const int* where) {
  float a[64] = {};
  for (int i = 0; i < 64; ++i) a[where[i]] = x[i];
  for (int i = 0; i < 64; ++i) x[i] = a[where[64 + i]];
}
"""

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")


def test_reads_every_kernel_and_the_functions_they_call():
    pressed, indexed, calls, far = read_report(REPORT)
    assert pressed.name.endswith("7pressedILi64EfEEvPT0_")
    assert (pressed.stack, pressed.spill_stores, pressed.spill_loads, pressed.registers) == (40, 44, 44, 32)
    assert indexed == Kernel("_Z7indexedPfPKi", "sm_80", registers=31)
    assert calls == Kernel("_Z5callsPfi", "sm_80", stack=32, registers=16)
    assert far == Kernel("_Z3farfi", "sm_80")
    (shared,) = read_report(SHARED_REPORT)
    assert (shared.arch, shared.registers, shared.shared) == ("sm_120", 166, 512)


def test_reports_each_kernel_that_uses_local_memory_once():
    spill, frame = complaints(read_report(REPORT))
    numbers = "uses local memory: {} bytes of stack frame, {} bytes of spill stores, {} bytes of spill loads"
    assert spill.endswith("on sm_80 " + numbers.format(40, 44, 44))
    assert frame.endswith("_Z5callsPfi on sm_80 " + numbers.format(32, 0, 0))
    assert complaints(read_report(SHARED_REPORT)) == []


def test_stores_or_loads_alone_are_spills():
    for line in (
        "0 bytes stack frame, 8 bytes spill stores, 0 bytes spill loads",
        "0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads",
    ):
        report = SHARED_REPORT.replace("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", line)
        assert len(complaints(read_report(report))) == 1


def test_a_called_function_that_spills_is_reported():
    properties = "Function properties for _Z3farfi\n    0 bytes stack frame, 0 bytes spill stores"
    report = REPORT.replace(properties, properties.replace("0 bytes spill stores", "8 bytes spill stores"))
    assert any("8 bytes of spill stores" in line for line in complaints(read_report(report)))


def test_an_incomplete_report_does_not_pass():
    with pytest.raises(ValueError, match="no kernel"):
        read_report("ptxas info    : 0 bytes gmem\n")
    silent = "".join(line for line in SHARED_REPORT.splitlines(True) if "stack frame" not in line)
    with pytest.raises(ValueError, match=r"did not report the local memory of .*key_sweep_kernel.* on sm_120"):
        read_report(silent)


def test_table_has_a_row_for_each_kernel_and_a_column_for_each_architecture():
    kernels = [Kernel("a", "sm_80", registers=31, shared=512), Kernel("a", "sm_90", registers=40)]
    head, row, other = table([*kernels, Kernel("b<64>", "sm_90", registers=8), Kernel("called", "sm_90")]).splitlines()
    assert head.split()[-2:] == ["sm_80", "sm_90"]
    assert re.split(r"\s{2,}", row) == ["a", "31 / 512", "40 / 0"]
    assert re.split(r"\s{2,}", other) == ["b<64>", "-", "8 / 0"]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_check, "source_dir", lambda: tmp_path)
    return tmp_path


@needs_nvcc
def test_a_kernel_that_spills_is_reported_by_name(sources, capsys):
    (sources / "spilling.cu").write_text(SPILLING)
    (sources / "clean.cu").write_text(CLEAN)
    assert cuda_check.main(["sm_80"]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda-check:")]
    assert len(failures) == 2
    (spill,) = (line for line in failures if "pressed" in line)
    assert re.search(r"on sm_80 uses local memory: .* [1-9]\d* bytes of spill stores", spill)
    (frame,) = (line for line in failures if "indexed" in line)
    assert re.search(r"on sm_80 uses local memory: [1-9]\d* bytes of stack frame", frame)


@needs_nvcc
def test_clean_kernels_pass_on_every_architecture(sources, capsys):
    (sources / "clean.cu").write_text(CLEAN)
    assert cuda_check.main(["sm_80", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert "no kernel uses local memory" in out
    assert "sm_90" in out


@needs_nvcc
def test_a_source_that_does_not_compile_is_reported(sources, capsys):
    (sources / "broken.cu").write_text("__global__ void kernel() { undeclared(); }\n")
    assert cuda_check.main(["sm_80"]) == 1
    assert "undeclared" in capsys.readouterr().out


@pytest.mark.slow
@needs_nvcc
def test_our_cuda_sources_compile():
    """`make cuda-check` also checks register spills, on every architecture."""
    assert any(kernel.registers for kernel in cuda_check.compile_sources(["sm_80"]))


def test_without_nvcc_the_check_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: None)
    assert cuda_check.main(["sm_80"]) == 0
    assert "skipped, because nvcc was not found" in capsys.readouterr().out
