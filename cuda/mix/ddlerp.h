// rwkv_peft::ddlerp: the five data-dependent mixes of time-mix, computed for one chunk of rows at a time.
//
// With d = previous - x:  low_rank = tanh((x + d maa_x) w1),  out_m = x + d (maa_m + low_rank_m w2_m).
// low_rank is saved for backward. The (5, rows, C) amounts exist for one chunk only; the backward computes them again.
#pragma once

#include <array>
#include <tuple>

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include "mix_host.h"

namespace rwkv_peft {

// The inputs, made contiguous, with parameters in fp32.
struct Ddlerp {
  Tensor x, last, mixed_base, w1, base, w2;
  Starts starts;
  int64_t batch, tokens, width, rank;
  const MixLoops& loops;

  Ddlerp(const Tensor& x_, const Tensor& last_, const Tensor& maa_x, const Tensor& w1_, const Tensor& maa,
         const Tensor& w2_, const std::optional<Tensor>& starts_)
      : x(three_dims(x_).contiguous()), starts(starts_, x), loops(mix_loops(is_bf16(x_))) {
    TORCH_CHECK(w2_.dim() == 3, "ddlerp: w2 must be (5, rank, C); found ", w2_.sizes());
    batch = x.size(0), tokens = x.size(1), width = x.size(2), rank = w2_.size(1);
    last = like("last", last_, {batch, width}, x);
    mixed_base = fp32("maa_x", maa_x, {width});
    w1 = fp32("w1", w1_, {width, kMixes * rank});
    base = fp32("maa", maa, {kMixes, width});
    w2 = fp32("w2", w2_, {kMixes, rank, width});
  }

  static const Tensor& three_dims(const Tensor& x) {
    TORCH_CHECK(x.dim() == 3, "ddlerp: x must be (B, T, C); found ", x.sizes());
    return x;
  }

  int64_t rows() const { return batch * tokens; }
  int64_t most_rows() const { return std::min(kChunkRows, rows()); }
  Rows chunk(int64_t first) const { return starts.in({width, tokens, first, std::min(kChunkRows, rows() - first)}); }
  Tensor buffer(int64_t count) const { return at::empty({count * width}, base.options()); }

  // Returns mix m's columns of low_rank or of its gradient: (rows, 5 rank) -> (rows, rank).
  Tensor of_mix(const Tensor& low_rank, int64_t m) const { return low_rank.narrow(1, m * rank, rank); }

  // Returns the input of the first low-rank product, (count, C).
  Tensor mixed(const Tensor& scratch, const Rows& n) const {
    Tensor out = part(scratch, n.count, width);
    Lerp a{n, x.const_data_ptr(), last.const_data_ptr(), mixed_base.const_data_ptr<float>(), nullptr, 1, {}};
    a.out[0] = out.mutable_data_ptr<float>();
    over_columns(width, kColumns, n.count, [&](int64_t begin, int64_t end) { loops.lerp_to_fp32(a, begin, end); });
    return out;
  }

  // Returns low_rank_m w2_m for all mixes, (5 * count, C), from these rows of low_rank.
  Tensor amounts(const Tensor& scratch, const Tensor& low_rank) const {
    const int64_t count = low_rank.size(0);
    Tensor out = part(scratch, kMixes * count, width);
    for (int64_t m = 0; m < kMixes; ++m) {
      Tensor one = out.narrow(0, m * count, count);
      at::mm_out(one, of_mix(low_rank, m), w2[m]);
    }
    return out;
  }
};

using Mixes = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Returns the inputs of decay, key, value, receptance and gate, and low_rank.
inline Mixes ddlerp(const Tensor& x, const Tensor& last, const Tensor& maa_x, const Tensor& w1, const Tensor& maa,
                    const Tensor& w2, const std::optional<Tensor>& starts) {
  const Ddlerp n(x, last, maa_x, w1, maa, w2, starts);
  std::array<Tensor, kMixes> out;
  for (Tensor& one : out) one = at::empty_like(n.x);
  Tensor low_rank = at::empty({n.rows(), kMixes * n.rank}, n.base.options());
  const Tensor scratch = n.buffer(kMixes * n.most_rows());
  for (int64_t first = 0; first < n.rows(); first += kChunkRows) {
    const Rows rows = n.chunk(first);
    Tensor activations = low_rank.narrow(0, first, rows.count);
    at::mm_out(activations, n.mixed(scratch, rows), n.w1);
    activations.tanh_();
    Lerp a{rows, n.x.const_data_ptr(), n.last.const_data_ptr(), n.base.const_data_ptr<float>(),
           n.amounts(scratch, activations).const_data_ptr<float>(), kMixes, {}};
    for (int64_t m = 0; m < kMixes; ++m) a.out[m] = out[m].mutable_data_ptr();
    over_columns(n.width, kColumns, rows.count, [&](int64_t begin, int64_t end) { n.loops.lerp(a, begin, end); });
  }
  return {out[0], out[1], out[2], out[3], out[4], low_rank};
}

// State of one backward pass: the gradients, and scratch memory for a chunk. Sums over tokens are computed per chunk
// and then added, which is more precise in fp32 than one long sum.
class DdlerpBackward {
 public:
  DdlerpBackward(const Ddlerp& n, const Tensor& low_rank, const std::array<Tensor, kMixes>& grad_out, bool train)
      : n_(n), low_rank_(fp32("low_rank", low_rank, {n.rows(), kMixes * n.rank})), grad_out_(grad_out), train_(train),
        grad_x_(at::empty_like(n.x)), grad_last_(at::empty_like(n.last)),
        grad_mixed_base_(sum_like(n.mixed_base, train)), grad_w1_(sum_like(n.w1, train)),
        grad_base_(sum_like(n.base, train)), grad_w2_(sum_like(n.w2, train)),
        amounts_(n.buffer(kMixes * n.most_rows())), mixed_(n.buffer(n.most_rows())), self_(n.buffer(n.most_rows())),
        previous_(n.buffer(n.most_rows())), carry_(at::zeros({n.width}, n.base.options())) {
    for (Tensor& one : grad_out_) one = like("a gradient", one, n.x.sizes(), n.x);
  }

  // Returns the gradients of (x, last, maa_x, w1, maa, w2). Those of parameters are in fp32, or empty without `train`.
  Mixes run() {
    for (int64_t first = (n_.rows() - 1) / kChunkRows * kChunkRows; first >= 0; first -= kChunkRows) {
      const Rows rows = n_.chunk(first);
      const Tensor low_rank = low_rank_.narrow(0, first, rows.count);
      const Tensor grad_amounts = through_mixes(rows, low_rank);
      const Tensor grad_mixed = through_products(rows, low_rank, grad_amounts);
      through_shift(rows, grad_mixed);
    }
    return {grad_x_, grad_last_, grad_mixed_base_, grad_w1_, grad_base_, grad_w2_};
  }

 private:
  // Fills self_ and previous_ and returns the gradient of the amounts, (5 * count, C).
  Tensor through_mixes(const Rows& rows, const Tensor& low_rank) {
    Tensor amounts = n_.amounts(amounts_, low_rank);
    LerpBackward a{};
    a.rows = rows, a.mixes = kMixes, a.x = n_.x.const_data_ptr(), a.last = n_.last.const_data_ptr();
    a.base = n_.base.const_data_ptr<float>(), a.amounts = amounts.mutable_data_ptr<float>();
    for (int64_t m = 0; m < kMixes; ++m) a.grad_out[m] = grad_out_[m].const_data_ptr();
    a.grad_self = self_.mutable_data_ptr<float>(), a.grad_previous = previous_.mutable_data_ptr<float>();
    Tensor grad_base = sum_like(n_.base, train_);
    a.grad_base = train_ ? grad_base.mutable_data_ptr<float>() : nullptr;
    over_columns(n_.width, kColumns, rows.count,
                 [&](int64_t begin, int64_t end) { n_.loops.lerp_backward(a, begin, end); });
    grad_base_.add_(grad_base);
    return amounts;
  }

  // Returns the gradient of the first product's input, (count, C).
  Tensor through_products(const Rows& rows, const Tensor& low_rank, const Tensor& grad_amounts) {
    Tensor grad = at::empty_like(low_rank);  // of low_rank, then of tanh's input
    for (int64_t m = 0; m < kMixes; ++m) {
      const Tensor grad_of_mix = grad_amounts.narrow(0, m * rows.count, rows.count);
      Tensor one = n_.of_mix(grad, m);
      at::mm_out(one, grad_of_mix, n_.w2[m].t());
      if (train_) grad_w2_[m].addmm_(n_.of_mix(low_rank, m).t(), grad_of_mix);
    }
    grad.mul_(low_rank.square().neg_().add_(1));
    if (train_) grad_w1_.addmm_(n_.mixed(mixed_, rows).t(), grad);
    Tensor grad_mixed = part(mixed_, rows.count, n_.width);
    return at::mm_out(grad_mixed, grad, n_.w1.t());
  }

  void through_shift(const Rows& rows, const Tensor& grad_mixed) {
    ShiftBackward a{};
    a.rows = rows, a.x = n_.x.const_data_ptr(), a.last = n_.last.const_data_ptr();
    a.grad_self = self_.const_data_ptr<float>(), a.grad_previous = previous_.const_data_ptr<float>();
    a.grad_mixed = grad_mixed.const_data_ptr<float>(), a.mixed_base = n_.mixed_base.const_data_ptr<float>();
    Tensor grad_mixed_base = sum_like(n_.mixed_base, train_);
    a.grad_mixed_base = train_ ? grad_mixed_base.mutable_data_ptr<float>() : nullptr;
    a.carry = carry_.mutable_data_ptr<float>();
    a.grad_x = grad_x_.mutable_data_ptr(), a.grad_last = grad_last_.mutable_data_ptr();
    over_columns(n_.width, kColumns, rows.count,
                 [&](int64_t begin, int64_t end) { n_.loops.shift_backward(a, begin, end); });
    grad_mixed_base_.add_(grad_mixed_base);
  }

  const Ddlerp& n_;
  const Tensor low_rank_;
  std::array<Tensor, kMixes> grad_out_;
  const bool train_;
  Tensor grad_x_, grad_last_, grad_mixed_base_, grad_w1_, grad_base_, grad_w2_;
  const Tensor amounts_, mixed_, self_, previous_, carry_;
};

inline Mixes ddlerp_backward(const Tensor& x, const Tensor& last, const Tensor& maa_x, const Tensor& w1,
                             const Tensor& maa, const Tensor& w2, const Tensor& low_rank, const Tensor& grad_w,
                             const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_r, const Tensor& grad_g,
                             bool train, const std::optional<Tensor>& starts) {
  const Ddlerp n(x, last, maa_x, w1, maa, w2, starts);
  return DdlerpBackward(n, low_rank, {grad_w, grad_k, grad_v, grad_r, grad_g}, train).run();
}

}  // namespace rwkv_peft
