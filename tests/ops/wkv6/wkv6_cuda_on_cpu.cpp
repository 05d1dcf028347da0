// Runs the CUDA kernels of cuda/wkv6/gpu, in the order of their launches, on the CPU, behind a C interface.
// test_wkv6_cuda_on_cpu.py calls it.
#include "wkv6_cuda_shim.h"
#include "passes.cuh"

using namespace rwkv_peft;

struct CpuQueue {
  template <typename Kernel, typename... Args>
  void launch(Kernel* kernel, int64_t blocks, int threads, const Args&... args) const {
    blockDim.x = threads;
    for (int64_t b = 0; b < blocks; ++b) {
      blockIdx.x = static_cast<unsigned>(Block::falling ? blocks - 1 - b : b);
      Block::run(threads, [&] { kernel(args...); });
    }
  }
};

extern "C" {

void set_order(bool falling) { Block::falling = falling; }
void set_missing_barrier(const char* file_and_line) { Block::missing_barrier = file_and_line; }

void forward(const Launch* n, const Forward* a) { run(CpuQueue{}, *n, *a); }
void backward(const Launch* n, const Backward* a) { run(CpuQueue{}, *n, *a); }
int64_t forward_scratch_floats(const Launch* n) { return forward_scratch(*n); }
int64_t backward_scratch_floats(const Launch* n) { return backward_scratch(*n); }
}
