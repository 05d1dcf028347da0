// The CUDA implementation of rwkv_peft::wkv6; wkv6_op.cpp, loaded first, defines the schemas.
//
// Streams and devices by PyTorch's device-neutral interface: unlike ATen/cuda/CUDAContext.h it also compiles against a
// PyTorch without CUDA, so that this file is checked on every machine.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "wkv6_cuda.h"
#include "wkv6_host.h"

namespace rwkv_peft {
namespace {

void* current_stream(const Tensor& x) {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(x.device()).native_handle();
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                                const Tensor& u, const Tensor& state, int64_t chunk) {
  const c10::DeviceGuard guard(r.device());
  return wkv6_forward(kCudaDevice, r, k, v, w, u, state, chunk, current_stream(r));
}

Gradients backward_cuda(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                        const Tensor& chunk_states, const Tensor& grad_y, const Tensor& grad_state_out, int64_t chunk) {
  const c10::DeviceGuard guard(r.device());
  return wkv6_backward(kCudaDevice, r, k, v, w, u, chunk_states, grad_y, grad_state_out, chunk, current_stream(r));
}

}  // namespace

TORCH_LIBRARY_IMPL(rwkv_peft, CUDA, m) {
  m.impl("wkv6", forward_cuda);
  m.impl("wkv6_backward", backward_cuda);
}

}  // namespace rwkv_peft
