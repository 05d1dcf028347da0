// Launches the kernels of wkv6_kernels.cuh. No torch headers: they cost nvcc a minute, and this file is also compiled
// where PyTorch has no CUDA (python -m rwkv_peft.ops.build --cuda-check).
#include "wkv6_cuda.h"

#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

#include "wkv6_kernels.cuh"

namespace rwkv_peft {
namespace {

template <int N, typename scalar_t>
void launch(const Launch& n, const ValueSweep& a) {
  value_sweep_kernel<N, scalar_t><<<n.batch * n.heads, N, 0, static_cast<cudaStream_t>(n.stream)>>>(n, a);
}

template <int N, typename scalar_t>
void launch(const Launch& n, const KeySweep& a) {
  key_sweep_kernel<N, scalar_t><<<n.batch * n.heads, N, 0, static_cast<cudaStream_t>(n.stream)>>>(n, a);
}

template <typename scalar_t, typename Sweep>
void launch_for_head_size(const Launch& n, const Sweep& a) {
  switch (n.head_size) {
    case 32: return launch<32, scalar_t>(n, a);
    case 64: return launch<64, scalar_t>(n, a);
    case 128: return launch<128, scalar_t>(n, a);
    default: throw std::runtime_error("wkv6: head size " + std::to_string(n.head_size) + " is not 32, 64 or 128");
  }
}

template <typename Sweep>
void run_cuda(const Launch& n, const Sweep& a) {
  switch (n.element) {
    case Element::kFloat32: launch_for_head_size<float>(n, a); break;
    case Element::kBFloat16: launch_for_head_size<__nv_bfloat16>(n, a); break;
    case Element::kFloat16: launch_for_head_size<__half>(n, a); break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("wkv6: ") + cudaGetErrorString(error));
}

}  // namespace

const Sweeps kCudaSweeps{run_cuda<ValueSweep>, run_cuda<KeySweep>, /*needs_scratch=*/true};

}  // namespace rwkv_peft
