// rwkv_peft::wkv6: schemas and the CPU implementation. Fake tensors and autograd are registered in ops/wkv6_native.py.
#include <torch/library.h>

#include "wkv6_cpu.h"
#include "wkv6_host.h"

namespace rwkv_peft {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                               const Tensor& u, const Tensor& state, int64_t chunk) {
  TORCH_CHECK(r.scalar_type() != at::kHalf, "wkv6: fp16 must be upcast on CPU");
  return wkv6_forward(kCpuDevice, r, k, v, w, u, state, chunk, /*stream=*/nullptr);
}

Gradients backward_cpu(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                       const Tensor& chunk_states, const Tensor& grad_y, const Tensor& grad_state_out, int64_t chunk) {
  TORCH_CHECK(r.scalar_type() != at::kHalf, "wkv6: fp16 must be upcast on CPU");
  return wkv6_backward(kCpuDevice, r, k, v, w, u, chunk_states, grad_y, grad_state_out, chunk, /*stream=*/nullptr);
}

}  // namespace

TORCH_LIBRARY(rwkv_peft, m) {
  m.def(
      "wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, int chunk)"
      " -> (Tensor y, Tensor state_out, Tensor chunk_states)");
  m.def(
      "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor chunk_states, Tensor grad_y,"
      " Tensor grad_state_out, int chunk)"
      " -> (Tensor grad_r, Tensor grad_k, Tensor grad_v, Tensor grad_w, Tensor grad_u, Tensor grad_state)");
}

TORCH_LIBRARY_IMPL(rwkv_peft, CPU, m) {
  m.impl("wkv6", forward_cpu);
  m.impl("wkv6_backward", backward_cpu);
}

}  // namespace rwkv_peft
