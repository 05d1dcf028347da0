// The CUDA implementation of rwkv_peft::wkv6. The CPU library, loaded first, defines the schemas (wkv6_op.cpp).
//
// Streams and devices use PyTorch's device-neutral interface. Unlike ATen/cuda/CUDAContext.h, it also compiles with a
// PyTorch without CUDA, so the tests can check this file on every machine.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "device.h"
#include "../wkv6_host.h"

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
