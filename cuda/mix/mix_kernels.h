// What a block does beside its products and WKV6, as loops over rows; no torch header, no threads.
//
// Tensors are contiguous, (rows, width) with a row for each token of each sequence. What is void* is fp32 or bf16,
// everything else is fp32, and so are all sums. Each call works on the columns [begin, end) alone and shares nothing
// with another, so any split over threads gives bitwise the same result.
#pragma once

#include <cstdint>

namespace rwkv_peft {

constexpr int kMixes = 5;  // the inputs of decay, key, value, receptance and gate

// `count` rows from `first`, of sequences of `tokens` rows each.
struct Rows {
  int64_t width, tokens, first, count;
  const bool* starts = nullptr;  // of all rows: whether a text begins there, with zeros before it; or null for nowhere
  const void* zeros = nullptr;   // (width), read where starts is set
};

// out_m = x + (previous - x) * (base_m + amounts_m): x moved towards the token before it.
struct Lerp {
  Rows rows;
  const void* x;         // all rows, as everything void* here
  const void* last;      // (sequences, width): what comes before each first token
  const float* base;     // (mixes, width)
  const float* amounts;  // (mixes, count, width), or null for none
  int64_t mixes;
  void* out[kMixes];
};

// First half of Lerp's gradient: all but the step from a token to its predecessor.
struct LerpBackward {
  Rows rows;
  const void *x, *last;  // read where amounts or grad_base is not null
  const float* base;
  float* amounts;  // as Lerp's; becomes its own gradient
  int64_t mixes;
  const void* grad_out[kMixes];
  float* grad_self;      // (count, width): what x gets from its own row
  float* grad_previous;  // (count, width): what the token before it gets
  float* grad_base;      // (mixes, width), added to; or null
};

// Second half: grad_x of these rows. Rows are worked off from the last to the first.
struct ShiftBackward {
  Rows rows;
  const float *grad_self, *grad_previous;
  const float* grad_mixed;  // (count, width) gradient of one more mix, with `mixed_base` and no amounts; or null
  const float* mixed_base;  // (width)
  const void *x, *last;     // read where grad_mixed_base is not null
  float* grad_mixed_base;   // (width), added to; or null
  float* carry;  // (width): grad_previous of the row after these, then of the first of these
  void *grad_x, *grad_last;
};

// out = (normalised y * weight + bias) * silu(gate); y is normalised over each `group` columns. All rows.
struct GatedNorm {
  Rows rows;
  int64_t group;
  float eps;
  const void *y, *gate;
  const float *weight, *bias;  // (width)
  void* out;
};

struct GatedNormBackward {
  GatedNorm forward;  // without out
  const void* grad_out;
  void *grad_y, *grad_gate;
  float *grad_weight, *grad_bias;  // (width), added to; or null both
};

// The loops for one element type.
struct MixLoops {
  void (*lerp)(const Lerp&, int64_t begin, int64_t end);
  void (*lerp_to_fp32)(const Lerp&, int64_t begin, int64_t end);  // out is float* and holds these rows alone
  void (*lerp_backward)(const LerpBackward&, int64_t begin, int64_t end);
  void (*shift_backward)(const ShiftBackward&, int64_t begin, int64_t end);
  void (*gated_norm)(const GatedNorm&, int64_t begin, int64_t end);  // whole groups
  void (*gated_norm_backward)(const GatedNormBackward&, int64_t begin, int64_t end);
  void (*relu_square)(const void* k, void* out, int64_t count);
  void (*relu_square_backward)(const void* grad, const void* out, void* grad_k, int64_t count);
};

// The loops of one instruction set.
struct MixKernels {
  const char* name;
  MixLoops fp32, bf16;
};

extern const MixKernels kPlainMixes;
#ifdef __x86_64__
extern const MixKernels kAvx2Mixes, kAvx512Mixes;
#endif

}  // namespace rwkv_peft
