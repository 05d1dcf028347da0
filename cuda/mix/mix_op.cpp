// rwkv_peft::ddlerp, shift_lerp, gated_norm and relu_square with their backwards on the CPU. This file checks tensors
// and calls the loops of mix_kernels.h. ops/mix/native.py registers fake tensors and autograd.
#include <optional>
#include <tuple>

#include <torch/library.h>

#include "ddlerp.h"
#include "mix_host.h"

namespace rwkv_peft {
namespace {

constexpr int64_t kShiftMixes = 2;  // of channel-mix: the inputs of key and receptance

// Interpolates between x and its predecessor with two constant amounts per channel, maa (2, C).
std::tuple<Tensor, Tensor> shift_lerp(const Tensor& x_, const Tensor& last_, const Tensor& maa,
                                      const std::optional<Tensor>& starts_) {
  TORCH_CHECK(x_.dim() == 3, "shift_lerp: x must be (B, T, C); found ", x_.sizes());
  const Tensor x = x_.contiguous(), last = like("last", last_, {x.size(0), x.size(2)}, x);
  const int64_t tokens = x.size(1), width = x.size(2), rows = x.size(0) * tokens;
  const Tensor base = fp32("maa", maa, {kShiftMixes, width});
  const Starts starts(starts_, x);
  Tensor k = at::empty_like(x), r = at::empty_like(x);
  const MixLoops& loops = mix_loops(is_bf16(x));
  const Lerp a{starts.in({width, tokens, 0, rows}), x.const_data_ptr(), last.const_data_ptr(), base.const_data_ptr<float>(),
               nullptr, kShiftMixes, {k.mutable_data_ptr(), r.mutable_data_ptr()}};
  over_columns(width, kColumns, rows, [&](int64_t begin, int64_t end) { loops.lerp(a, begin, end); });
  return {k, r};
}

// Returns the gradients of (x, last, maa). x and last are needed only for maa's, which is empty without them.
std::tuple<Tensor, Tensor, Tensor> shift_lerp_backward(const std::optional<Tensor>& x_,
                                                       const std::optional<Tensor>& last_, const Tensor& maa,
                                                       const Tensor& grad_k_, const Tensor& grad_r_,
                                                       const std::optional<Tensor>& starts_) {
  TORCH_CHECK(grad_k_.dim() == 3 && x_.has_value() == last_.has_value(),
              "shift_lerp: the gradients must be (B, T, C), and x and last must both be given or both be omitted");
  const Tensor grad_k = grad_k_.contiguous(), grad_r = like("a gradient", grad_r_, grad_k.sizes(), grad_k);
  const int64_t batch = grad_k.size(0), tokens = grad_k.size(1), width = grad_k.size(2);
  const Tensor x = x_ ? like("x", *x_, grad_k.sizes(), grad_k) : Tensor();
  const Tensor last = last_ ? like("last", *last_, {batch, width}, grad_k) : Tensor();
  const Tensor base = fp32("maa", maa, {kShiftMixes, width});
  const Starts starts(starts_, grad_k);
  Tensor grad_x = at::empty_like(grad_k), grad_last = at::empty({batch, width}, grad_k.options());
  Tensor grad_maa = sum_like(base, x_.has_value()), carry = at::zeros({width}, base.options());
  Tensor self = at::empty({kChunkRows, width}, base.options()), previous = at::empty_like(self);
  const MixLoops& loops = mix_loops(is_bf16(grad_k));

  LerpBackward a{};
  a.base = base.const_data_ptr<float>(), a.mixes = kShiftMixes;
  a.grad_out[0] = grad_k.const_data_ptr(), a.grad_out[1] = grad_r.const_data_ptr();
  a.grad_self = self.mutable_data_ptr<float>(), a.grad_previous = previous.mutable_data_ptr<float>();
  if (x_) a.x = x.const_data_ptr(), a.last = last.const_data_ptr();
  ShiftBackward b{};
  b.grad_self = a.grad_self, b.grad_previous = a.grad_previous, b.carry = carry.mutable_data_ptr<float>();
  b.grad_x = grad_x.mutable_data_ptr(), b.grad_last = grad_last.mutable_data_ptr();
  const int64_t rows = batch * tokens;
  for (int64_t first = (rows - 1) / kChunkRows * kChunkRows; first >= 0; first -= kChunkRows) {
    a.rows = b.rows = starts.in({width, tokens, first, std::min(kChunkRows, rows - first)});
    Tensor grad_of_chunk = sum_like(base, x_.has_value());
    a.grad_base = x_ ? grad_of_chunk.mutable_data_ptr<float>() : nullptr;
    over_columns(width, kColumns, a.rows.count, [&](int64_t begin, int64_t end) {
      loops.lerp_backward(a, begin, end);
      loops.shift_backward(b, begin, end);
    });
    grad_maa.add_(grad_of_chunk);
  }
  return {grad_x, grad_last, grad_maa};
}

struct NormInputs {
  Tensor y, gate, weight, bias;
  GatedNorm call;

  NormInputs(const Tensor& y_, const Tensor& gate_, const Tensor& weight_, const Tensor& bias_, int64_t groups,
             double eps)
      : y(y_.contiguous()), gate(like("gate", gate_, y_.sizes(), y_)) {
    const int64_t width = y.size(-1);
    TORCH_CHECK(y.dim() == 3 && groups > 0 && width % groups == 0,
                "gated_norm: y must be (B, T, C) with C divisible by ", groups, " groups; found ", y.sizes());
    weight = fp32("weight", weight_, {width}), bias = fp32("bias", bias_, {width});
    call = {{width, y.size(1), 0, y.size(0) * y.size(1)}, width / groups, static_cast<float>(eps), y.const_data_ptr(),
            gate.const_data_ptr(), weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), nullptr};
  }
};

Tensor gated_norm(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias, int64_t groups,
                  double eps) {
  NormInputs n(y, gate, weight, bias, groups, eps);
  Tensor out = at::empty_like(n.y);
  n.call.out = out.mutable_data_ptr();
  const MixLoops& loops = mix_loops(is_bf16(y));
  over_columns(n.call.rows.width, n.call.group, n.call.rows.count,
               [&](int64_t begin, int64_t end) { loops.gated_norm(n.call, begin, end); });
  return out;
}

// Returns the gradients of (y, gate, weight, bias). The last two are in fp32, or empty without `train`.
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& y, const Tensor& gate,
                                                               const Tensor& weight, const Tensor& bias, int64_t groups,
                                                               double eps, const Tensor& grad_, bool train) {
  const NormInputs n(y, gate, weight, bias, groups, eps);
  const Tensor grad = like("the gradient", grad_, n.y.sizes(), n.y);
  Tensor grad_y = at::empty_like(n.y), grad_gate = at::empty_like(n.y);
  Tensor grad_weight = sum_like(n.weight, train), grad_bias = sum_like(n.bias, train);
  const GatedNormBackward a{n.call, grad.const_data_ptr(), grad_y.mutable_data_ptr(), grad_gate.mutable_data_ptr(),
                            train ? grad_weight.mutable_data_ptr<float>() : nullptr,
                            train ? grad_bias.mutable_data_ptr<float>() : nullptr};
  const MixLoops& loops = mix_loops(is_bf16(y));
  over_columns(n.call.rows.width, n.call.group, n.call.rows.count,
               [&](int64_t begin, int64_t end) { loops.gated_norm_backward(a, begin, end); });
  return {grad_y, grad_gate, grad_weight, grad_bias};
}

// Calls body(first, count) in parallel on parts of `size` elements.
template <typename Body>
void over_elements(int64_t size, const Body& body) {
  at::parallel_for(0, size, kWorthAThread, [&](int64_t first, int64_t last) { body(first, last - first); });
}

Tensor relu_square(const Tensor& k_) {
  const Tensor k = k_.contiguous();
  Tensor out = at::empty_like(k);
  const bool bf16 = is_bf16(k);
  const char* from = static_cast<const char*>(k.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = k.element_size();
  over_elements(k.numel(), [&](int64_t first, int64_t count) {
    mix_loops(bf16).relu_square(from + first * size, to + first * size, count);
  });
  return out;
}

// Computes the gradient from the output only.
Tensor relu_square_backward(const Tensor& grad_, const Tensor& out_) {
  const Tensor out = out_.contiguous(), grad = like("the gradient", grad_, out.sizes(), out);
  Tensor grad_k = at::empty_like(out);
  const bool bf16 = is_bf16(out);
  const char* upper = static_cast<const char*>(grad.const_data_ptr());
  const char* kept = static_cast<const char*>(out.const_data_ptr());
  char* to = static_cast<char*>(grad_k.mutable_data_ptr());
  const int64_t size = out.element_size();
  over_elements(out.numel(), [&](int64_t first, int64_t count) {
    mix_loops(bf16).relu_square_backward(upper + first * size, kept + first * size, to + first * size, count);
  });
  return grad_k;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv_peft, m) {
  m.def(
      "ddlerp(Tensor x, Tensor last, Tensor maa_x, Tensor w1, Tensor maa, Tensor w2, Tensor? starts=None)"
      " -> (Tensor w, Tensor k, Tensor v, Tensor r, Tensor g, Tensor low_rank)");
  m.def(
      "ddlerp_backward(Tensor x, Tensor last, Tensor maa_x, Tensor w1, Tensor maa, Tensor w2, Tensor low_rank,"
      " Tensor grad_w, Tensor grad_k, Tensor grad_v, Tensor grad_r, Tensor grad_g, bool train,"
      " Tensor? starts=None)"
      " -> (Tensor grad_x, Tensor grad_last, Tensor grad_maa_x, Tensor grad_w1, Tensor grad_maa, Tensor grad_w2)");
  m.def("shift_lerp(Tensor x, Tensor last, Tensor maa, Tensor? starts=None) -> (Tensor k, Tensor r)");
  m.def(
      "shift_lerp_backward(Tensor? x, Tensor? last, Tensor maa, Tensor grad_k, Tensor grad_r, Tensor? starts=None)"
      " -> (Tensor grad_x, Tensor grad_last, Tensor grad_maa)");
  m.def("gated_norm(Tensor y, Tensor gate, Tensor weight, Tensor bias, int groups, float eps) -> Tensor");
  m.def(
      "gated_norm_backward(Tensor y, Tensor gate, Tensor weight, Tensor bias, int groups, float eps, Tensor grad,"
      " bool train) -> (Tensor grad_y, Tensor grad_gate, Tensor grad_weight, Tensor grad_bias)");
  m.def("relu_square(Tensor k) -> Tensor");
  m.def("relu_square_backward(Tensor grad, Tensor out) -> Tensor");
  // For tests: the supported instruction sets, best first, and the selection of one.
  m.def("mix_cpu_levels() -> str[]", [] { return mix_levels().names(); });
  m.def("mix_use_cpu_level(str level) -> str", [](const std::string& name) { return mix_levels().use(name); });
}

TORCH_LIBRARY_IMPL(rwkv_peft, CPU, m) {
  m.impl("ddlerp", ddlerp);
  m.impl("ddlerp_backward", ddlerp_backward);
  m.impl("shift_lerp", shift_lerp);
  m.impl("shift_lerp_backward", shift_lerp_backward);
  m.impl("gated_norm", gated_norm);
  m.impl("gated_norm_backward", gated_norm_backward);
  m.impl("relu_square", relu_square);
  m.impl("relu_square_backward", relu_square_backward);
}

}  // namespace rwkv_peft
