// Shared by the host code of cuda/mix: argument checks for memory safety, threads, and scratch memory.
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

// Number of tokens processed at a time. Values that the backward recomputes exist only for these tokens.
constexpr int64_t kChunkRows = 256;
// Smallest number of columns for one thread, and number of elements for which another thread is worth starting.
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
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "mix: activations must be fp32 or bf16; found ", type);
  return type == at::kBFloat16;
}

inline Tensor like(const char* name, const Tensor& t, at::IntArrayRef sizes, const Tensor& x) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == x.scalar_type(), "mix: ", name, " must have shape ",
              sizes, " and type ", x.scalar_type(), "; found ", t.sizes(), " and ", t.scalar_type());
  return t.contiguous();
}

inline Tensor fp32(const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.sizes() == sizes, "mix: ", name, " must have shape ", sizes, "; found ", t.sizes());
  return t.to(at::kFloat).contiguous();
}

// The first tokens of texts inside the sequences of x (B, T, C), and the zeros that precede them.
struct Starts {
  Tensor rows, zeros;  // (B, T) bool, (C); undefined if no text starts inside a sequence

  Starts(const std::optional<Tensor>& starts, const Tensor& x) {
    if (!starts) return;
    TORCH_CHECK(starts->sizes() == x.sizes().slice(0, 2) && starts->scalar_type() == at::kBool,
                "mix: starts must be bool of shape ", x.sizes().slice(0, 2), "; found ", starts->scalar_type(), " ",
                starts->sizes());
    rows = starts->contiguous(), zeros = at::zeros({x.size(2)}, x.options());
  }

  // Returns `n` with the pointers to these starts.
  Rows in(Rows n) const {
    if (rows.defined()) n.starts = rows.const_data_ptr<bool>(), n.zeros = zeros.const_data_ptr();
    return n;
  }
};

// Calls body(begin, end) on slices of `width` columns in parallel. Each slice except the last is a multiple of `unit`.
template <typename Body>
void over_columns(int64_t width, int64_t unit, int64_t rows, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, rows * unit));
  at::parallel_for(0, (width + unit - 1) / unit, grain, [&](int64_t first, int64_t last) {
    body(first * unit, std::min(last * unit, width));
  });
}

// Returns the first elements of `buffer` as a contiguous (rows, columns).
inline Tensor part(const Tensor& buffer, int64_t rows, int64_t columns) {
  return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

// Returns a tensor of zeros to which gradients are added, or an empty tensor if no gradient is wanted.
inline Tensor sum_like(const Tensor& t, bool wanted) {
  return wanted ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
}

}  // namespace rwkv_peft
