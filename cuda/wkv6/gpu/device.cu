// Launches the kernels on a CUDA stream. Without torch headers: nvcc would need a minute for them, and this file is
// also compiled on machines whose PyTorch has no CUDA (make cuda-check).
#include "device.h"

#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

#include "passes.cuh"

namespace rwkv_peft {
namespace {

struct StreamQueue {
  cudaStream_t stream;

  template <typename Kernel, typename... Args>
  void launch(Kernel* kernel, int64_t blocks, int threads, const Args&... args) const {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("wkv6: ") + cudaGetErrorString(error));
  }
};

template <typename Pass>
void run_on_stream(const Launch& n, const Pass& a) {
  run(StreamQueue{static_cast<cudaStream_t>(n.stream)}, n, a);
}

}  // namespace

const Device kCudaDevice{run_on_stream<Forward>, run_on_stream<Backward>, forward_scratch, backward_scratch};

}  // namespace rwkv_peft
