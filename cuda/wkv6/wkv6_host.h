// rwkv_peft::wkv6 and its backward on tensors, for any device that provides a Device (wkv6_call.h).
//
// This is a header because the CPU and the CUDA library are built separately: a machine without nvcc still gets the CPU
// library. ops/wkv6/op.py has already checked shapes and types. The checks here are those needed for memory safety.
#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "wkv6_call.h"

namespace rwkv_peft {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Element::kFloat32;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kFloat16;
    default: TORCH_CHECK(false, "wkv6: r, k, v must be fp32, bf16 or fp16; found ", x.scalar_type());
  }
}

inline Launch make_launch(const Tensor& r, int64_t chunk, void* stream) {
  TORCH_CHECK(r.dim() == 4, "wkv6: r must be (B, T, H, N); found ", r.sizes());
  TORCH_CHECK(chunk >= 0, "wkv6: chunk must not be negative; found ", chunk);
  return {r.size(0), r.size(1), r.size(2), r.size(3), chunk, element_of(r), stream};
}

inline Tensor contiguous_like(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() && x.device() == like.device(),
              "wkv6: ", name, " must have the shape, type and device of r");
  return x.contiguous();
}

inline Tensor contiguous_fp32(const char* name, const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == at::kFloat && x.device() == like.device(), "wkv6: ", name,
              " must be fp32 of shape ", sizes, " on the device of r");
  return x.contiguous();
}

// Returns (y, state_out, chunk_states); see _fake_forward in ops/wkv6/native.py for the shapes.
inline std::tuple<Tensor, Tensor, Tensor> wkv6_forward(const Device& device, const Tensor& r, const Tensor& k,
                                                       const Tensor& v, const Tensor& w, const Tensor& u,
                                                       const Tensor& state, int64_t chunk, void* stream) {
  const Launch n = make_launch(r, chunk, stream);
  const Tensor r_ = r.contiguous(), k_ = contiguous_like("k", k, r), v_ = contiguous_like("v", v, r);
  const Tensor w_ = contiguous_fp32("w", w, r.sizes(), r);
  const Tensor u_ = contiguous_fp32("u", u, {n.heads, n.head_size}, r);
  const Tensor state_ = contiguous_fp32("state", state, {n.batch, n.heads, n.head_size, n.head_size}, r);
  Tensor y = at::empty_like(r_), state_out = at::empty_like(state_);
  Tensor chunk_states = at::empty({n.batch, n.heads, n.chunks(), n.head_size, n.head_size}, state_.options());
  Tensor scratch = at::empty({device.forward_scratch(n)}, state_.options());

  Forward a{};
  a.r = r_.const_data_ptr(), a.k = k_.const_data_ptr(), a.v = v_.const_data_ptr();
  a.w = w_.const_data_ptr<float>(), a.u = u_.const_data_ptr<float>();
  a.first_state = state_.const_data_ptr<float>(), a.last_state = state_out.mutable_data_ptr<float>();
  a.y = y.mutable_data_ptr(), a.chunk_states = chunk_states.mutable_data_ptr<float>();
  a.scratch = scratch.mutable_data_ptr<float>();
  device.forward(n, a);
  return {y, state_out, chunk_states};
}

// Returns the gradients of (r, k, v, w, u, state). Those of w, u and state are in fp32.
inline Gradients wkv6_backward(const Device& device, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                               const Tensor& u, const Tensor& chunk_states, const Tensor& grad_y,
                               const Tensor& grad_state_out, int64_t chunk, void* stream) {
  const Launch n = make_launch(r, chunk, stream);
  TORCH_CHECK(chunk > 0, "wkv6: the backward needs the states saved by a forward with chunk > 0; found chunk ", chunk);
  const int64_t B = n.batch, H = n.heads, N = n.head_size;
  const Tensor r_ = r.contiguous(), k_ = contiguous_like("k", k, r), v_ = contiguous_like("v", v, r);
  const Tensor w_ = contiguous_fp32("w", w, r.sizes(), r);
  const Tensor u_ = contiguous_fp32("u", u, {H, N}, r);
  const Tensor chunk_states_ = contiguous_fp32("chunk_states", chunk_states, {B, H, n.chunks(), N, N}, r);
  const Tensor grad_y_ = contiguous_like("grad_y", grad_y, r);
  const Tensor grad_last = contiguous_fp32("grad_state_out", grad_state_out, {B, H, N, N}, r);
  Tensor grad_r = at::empty_like(r_), grad_k = at::empty_like(r_), grad_v = at::empty_like(r_);
  Tensor grad_w = at::empty_like(w_), grad_first = at::empty_like(grad_last);
  Tensor grad_u = at::empty({B, H, N}, u_.options());
  Tensor scratch = at::empty({device.backward_scratch(n)}, u_.options());

  Backward a{};
  a.r = r_.const_data_ptr(), a.k = k_.const_data_ptr(), a.v = v_.const_data_ptr(), a.grad_y = grad_y_.const_data_ptr();
  a.w = w_.const_data_ptr<float>(), a.u = u_.const_data_ptr<float>();
  a.chunk_states = chunk_states_.const_data_ptr<float>(), a.grad_last_state = grad_last.const_data_ptr<float>();
  a.grad_r = grad_r.mutable_data_ptr(), a.grad_k = grad_k.mutable_data_ptr(), a.grad_v = grad_v.mutable_data_ptr();
  a.grad_w = grad_w.mutable_data_ptr<float>(), a.grad_u = grad_u.mutable_data_ptr<float>();
  a.grad_first_state = grad_first.mutable_data_ptr<float>(), a.scratch = scratch.mutable_data_ptr<float>();
  device.backward(n, a);
  return {grad_r, grad_k, grad_v, grad_w, grad_u.sum(0), grad_first};
}

}  // namespace rwkv_peft
