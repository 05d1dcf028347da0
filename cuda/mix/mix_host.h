// What the host code of cuda/mix shares: checks that memory safety needs, threads, scratch.
#pragma once

#include <algorithm>
#include <optional>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../cpu_levels.h"
#include "mix_kernels.h"

namespace rwkv_peft {

using at::Tensor;

// Tokens worked on at a time: what is made again for the backward exists for these alone.
constexpr int64_t kChunkRows = 256;
// Columns that one thread takes at least, and elements that are worth waking it.
constexpr int64_t kColumns = 64, kWorthAThread = 16384;

inline CpuLevels<MixKernels>& mix_levels() {
#ifdef __x86_64__
  static CpuLevels<MixKernels> levels(&kAvx512Mixes, &kAvx2Mixes, kPlainMixes);
#else
  static CpuLevels<MixKernels> levels(nullptr, nullptr, kPlainMixes);
#endif
  return levels;
}

// The loops of the chosen instruction set.
inline const MixLoops& mix_loops(bool bf16) {
  const MixKernels& kernels = mix_levels().chosen();
  return bf16 ? kernels.bf16 : kernels.fp32;
}

inline bool is_bf16(const Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "activations must be fp32 or bf16, not ", type);
  return type == at::kBFloat16;
}

inline Tensor like(const char* name, const Tensor& t, at::IntArrayRef sizes, const Tensor& x) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == x.scalar_type(), name, " must be of shape ", sizes,
              " in x's type");
  return t.contiguous();
}

inline Tensor fp32(const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.sizes() == sizes, name, " must be of shape ", sizes, ", found ", t.sizes());
  return t.to(at::kFloat).contiguous();
}

// Where texts begin inside the sequences of x (B, T, C), and what comes before each.
struct Starts {
  Tensor rows, zeros;  // (B, T) bool, (C); undefined where no text begins inside

  Starts(const std::optional<Tensor>& starts, const Tensor& x) {
    if (!starts) return;
    TORCH_CHECK(starts->sizes() == x.sizes().slice(0, 2) && starts->scalar_type() == at::kBool,
                "starts must be a bool of shape ", x.sizes().slice(0, 2));
    rows = starts->contiguous(), zeros = at::zeros({x.size(2)}, x.options());
  }

  // The rows `n` with this in them.
  Rows in(Rows n) const {
    if (rows.defined()) n.starts = rows.const_data_ptr<bool>(), n.zeros = zeros.const_data_ptr();
    return n;
  }
};

// Calls body(begin, end) on slices of `width` columns, each a multiple of `unit` but the last.
template <typename Body>
void over_columns(int64_t width, int64_t unit, int64_t rows, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, rows * unit));
  at::parallel_for(0, (width + unit - 1) / unit, grain, [&](int64_t first, int64_t last) {
    body(first * unit, std::min(last * unit, width));
  });
}

// The first elements of `buffer` as a contiguous (rows, columns).
inline Tensor part(const Tensor& buffer, int64_t rows, int64_t columns) {
  return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

// A tensor that gradients are added to, or an empty one where none is wanted.
inline Tensor sum_like(const Tensor& t, bool wanted) {
  return wanted ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
}

}  // namespace rwkv_peft
