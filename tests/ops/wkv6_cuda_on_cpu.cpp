// The CUDA kernels of cuda/wkv6 behind a C interface, running on the CPU. Driven by test_wkv6_cuda_on_cpu.py.
#include "wkv6_cuda_shim.h"

namespace rwkv_peft {
// In the place of cuda_fp16.h's. Ahead of the kernels: a built-in type is not looked up again at instantiation.
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline void store(_Float16* to, float x) { *to = static_cast<_Float16>(x); }
}  // namespace rwkv_peft

#include "wkv6_kernels.cuh"

namespace rwkv_peft {

template <typename Sweep, typename Kernel>
void run_blocks(const Launch& n, const Sweep& a, bool falling, const Kernel& kernel) {
  for (blockIdx.x = 0; blockIdx.x < n.batch * n.heads; ++blockIdx.x) {
    Block::run(static_cast<int>(n.head_size), falling, [&] { kernel(n, a); });
  }
}

template <int N, typename scalar_t>
void run(const Launch& n, const ValueSweep& a, bool falling) {
  run_blocks(n, a, falling, value_sweep_kernel<N, scalar_t>);
}

template <int N, typename scalar_t>
void run(const Launch& n, const KeySweep& a, bool falling) {
  run_blocks(n, a, falling, key_sweep_kernel<N, scalar_t>);
}

template <typename scalar_t, typename Sweep>
void run_for_head_size(const Launch& n, const Sweep& a, bool falling) {
  switch (n.head_size) {
    case 32: return run<32, scalar_t>(n, a, falling);
    case 64: return run<64, scalar_t>(n, a, falling);
    default: throw std::invalid_argument("head size");
  }
}

template <typename Sweep>
void run_any(const Launch& n, const Sweep& a, bool falling) {
  if (n.element == Element::kFloat16) return run_for_head_size<_Float16>(n, a, falling);
  return run_for_head_size<float>(n, a, falling);
}

}  // namespace rwkv_peft

extern "C" void value_sweep(const rwkv_peft::Launch* n, const rwkv_peft::ValueSweep* a, bool falling) {
  rwkv_peft::run_any(*n, *a, falling);
}

extern "C" void key_sweep(const rwkv_peft::Launch* n, const rwkv_peft::KeySweep* a, bool falling) {
  rwkv_peft::run_any(*n, *a, falling);
}
