// rwkv_peft::wkv6: schemas and the CPU implementation. ops/wkv6/native.py registers fake tensors and autograd.
#include <torch/library.h>

#include "cpu/device.h"
#include "wkv6_host.h"

namespace rwkv_peft {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                               const Tensor& u, const Tensor& state, int64_t chunk) {
  TORCH_CHECK(r.scalar_type() != at::kHalf, "wkv6: fp16 is not supported on the CPU; convert to fp32");
  return wkv6_forward(kCpuDevice, r, k, v, w, u, state, chunk, /*stream=*/nullptr);
}

Gradients backward_cpu(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                       const Tensor& chunk_states, const Tensor& grad_y, const Tensor& grad_state_out, int64_t chunk) {
  TORCH_CHECK(r.scalar_type() != at::kHalf, "wkv6: fp16 is not supported on the CPU; convert to fp32");
  return wkv6_backward(kCpuDevice, r, k, v, w, u, chunk_states, grad_y, grad_state_out, chunk, /*stream=*/nullptr);
}

Tensor step(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, Tensor& state) {
  TORCH_CHECK(r.scalar_type() != at::kHalf, "wkv6: fp16 is not supported on the CPU; convert to fp32");
  const Launch n = make_launch(r, /*chunk=*/0, /*stream=*/nullptr);
  TORCH_CHECK(n.tokens == 1, "wkv6_step: r must have one token; found ", n.tokens);
  TORCH_CHECK(state.is_contiguous(), "wkv6_step: state must be contiguous, because it is updated in place");
  const Tensor r_ = r.contiguous(), k_ = contiguous_like("k", k, r), v_ = contiguous_like("v", v, r);
  const Tensor w_ = contiguous_fp32("w", w, r.sizes(), r);
  const Tensor u_ = contiguous_fp32("u", u, {n.heads, n.head_size}, r);
  contiguous_fp32("state", state, {n.batch, n.heads, n.head_size, n.head_size}, r);
  Tensor y = at::empty_like(r_);
  step_cpu(n, {r_.const_data_ptr(), k_.const_data_ptr(), v_.const_data_ptr(), w_.const_data_ptr<float>(),
               u_.const_data_ptr<float>(), y.mutable_data_ptr(), state.mutable_data_ptr<float>()});
  return y;
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
  m.def("wkv6_step(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state) -> Tensor y");
  // For tests: the supported instruction sets, best first, and the selection of one.
  m.def("wkv6_cpu_levels() -> str[]", [] { return cpu_levels().names(); });
  m.def("wkv6_use_cpu_level(str level) -> str", [](const std::string& name) { return cpu_levels().use(name); });
}

TORCH_LIBRARY_IMPL(rwkv_peft, CPU, m) {
  m.impl("wkv6", forward_cpu);
  m.impl("wkv6_backward", backward_cpu);
  m.impl("wkv6_step", step);
}

}  // namespace rwkv_peft
