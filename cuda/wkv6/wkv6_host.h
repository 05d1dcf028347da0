// rwkv_peft::wkv6 and its backward in terms of tensors, for any device that provides the two sweeps.
//
// A header, because the CPU and the CUDA library are built apart: a machine without nvcc still gets the CPU's.
// Python (ops/wkv6.py) has checked shapes and types; what is asserted here is what memory safety needs.
#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>

#include "wkv6_sweeps.h"

namespace rwkv_peft {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Element::kFloat32;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kFloat16;
    default: TORCH_CHECK(false, "wkv6: r, k, v must be fp32, bf16 or fp16, not ", x.scalar_type());
  }
}

inline Launch make_launch(const Tensor& r, int64_t chunk, void* stream) {
  TORCH_CHECK(r.dim() == 4, "wkv6: r must be (B, T, H, N)");
  TORCH_CHECK(chunk >= 0, "wkv6: chunk must not be negative");
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

// exp(-exp(w)). By ATen, whose exp is vectorised; a libm call per element would take longer than the sweeps.
inline Tensor decay_of(const Tensor& w) { return w.exp().neg_().exp_(); }

// d decay / dw = -exp(w) exp(-exp(w)), written so that no finite w gives inf * 0.
inline Tensor grad_w_of(const Tensor& w, const Tensor& grad_decay) {
  return w.sub(w.exp()).exp_().mul_(grad_decay).neg_();
}

// (y, state_out, chunk_states); see ops/wkv6_native.py for the shapes.
inline std::tuple<Tensor, Tensor, Tensor> wkv6_forward(const Sweeps& sweeps, const Tensor& r, const Tensor& k,
                                                       const Tensor& v, const Tensor& w, const Tensor& u,
                                                       const Tensor& state, int64_t chunk, void* stream) {
  const Launch n = make_launch(r, chunk, stream);
  const Tensor r_ = r.contiguous(), k_ = contiguous_like("k", k, r), v_ = contiguous_like("v", v, r);
  const Tensor decay = decay_of(contiguous_fp32("w", w, r.sizes(), r));
  const Tensor u_ = contiguous_fp32("u", u, {n.heads, n.head_size}, r);
  const Tensor state_ = contiguous_fp32("state", state, {n.batch, n.heads, n.head_size, n.head_size}, r);
  Tensor y = at::empty_like(r_), state_out = at::empty_like(state_);
  Tensor chunk_states = at::empty({n.batch, n.heads, n.chunks(), n.head_size, n.head_size}, state_.options());

  ValueSweep a{};
  a.read = r_.const_data_ptr(), a.write = k_.const_data_ptr(), a.in = v_.const_data_ptr();
  a.decay = decay.const_data_ptr<float>(), a.u = u_.const_data_ptr<float>();
  a.first_state = state_.const_data_ptr<float>(), a.last_state = state_out.mutable_data_ptr<float>();
  a.out = y.mutable_data_ptr(), a.chunk_states = chunk_states.mutable_data_ptr<float>();
  a.backward_in_time = false;
  sweeps.values(n, a);
  return {y, state_out, chunk_states};
}

// Gradients of (r, k, v, w, u, state); those of w, u and state in fp32.
inline Gradients wkv6_backward(const Sweeps& sweeps, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                               const Tensor& u, const Tensor& chunk_states, const Tensor& grad_y,
                               const Tensor& grad_state_out, int64_t chunk, void* stream) {
  const Launch n = make_launch(r, chunk, stream);
  TORCH_CHECK(chunk > 0, "wkv6: the backward needs the states that a forward with chunk > 0 keeps");
  const int64_t B = n.batch, H = n.heads, N = n.head_size;
  const Tensor r_ = r.contiguous(), k_ = contiguous_like("k", k, r), v_ = contiguous_like("v", v, r);
  const Tensor w_ = contiguous_fp32("w", w, r.sizes(), r), decay = decay_of(w_);
  const Tensor u_ = contiguous_fp32("u", u, {H, N}, r);
  const Tensor chunk_states_ = contiguous_fp32("chunk_states", chunk_states, {B, H, n.chunks(), N, N}, r);
  const Tensor grad_y_ = contiguous_like("grad_y", grad_y, r);
  const Tensor grad_last = contiguous_fp32("grad_state_out", grad_state_out, {B, H, N, N}, r);
  Tensor grad_r = at::empty_like(r_), grad_k = at::empty_like(r_), grad_v = at::empty_like(r_);
  Tensor grad_decay = at::empty_like(decay), grad_state = at::empty_like(grad_last);
  Tensor grad_u = at::empty({B, H, N}, u_.options());
  Tensor scratch = at::empty({sweeps.needs_scratch ? B * H * chunk * N * N : 0}, u_.options());

  ValueSweep a{};
  a.read = k_.const_data_ptr(), a.write = r_.const_data_ptr(), a.in = grad_y_.const_data_ptr();
  a.decay = decay.const_data_ptr<float>(), a.u = u_.const_data_ptr<float>();
  a.first_state = grad_last.const_data_ptr<float>(), a.last_state = grad_state.mutable_data_ptr<float>();
  a.out = grad_v.mutable_data_ptr(), a.backward_in_time = true;
  Launch keep_no_states = n;
  keep_no_states.chunk = 0;
  sweeps.values(keep_no_states, a);

  KeySweep b{};
  b.r = r_.const_data_ptr(), b.k = k_.const_data_ptr(), b.v = v_.const_data_ptr(), b.grad_y = grad_y_.const_data_ptr();
  b.decay = decay.const_data_ptr<float>(), b.u = u_.const_data_ptr<float>();
  b.chunk_states = chunk_states_.const_data_ptr<float>(), b.grad_last_state = grad_last.const_data_ptr<float>();
  b.grad_r = grad_r.mutable_data_ptr(), b.grad_k = grad_k.mutable_data_ptr();
  b.grad_decay = grad_decay.mutable_data_ptr<float>(), b.grad_u = grad_u.mutable_data_ptr<float>();
  b.scratch = scratch.mutable_data_ptr<float>();
  sweeps.keys(n, b);
  return {grad_r, grad_k, grad_v, grad_w_of(w_, grad_decay), grad_u.sum(0), grad_state};
}

}  // namespace rwkv_peft
