// The element-wise steps of a block as loops over rows, without torch headers and threads.
//
// Tensors are contiguous (rows, width), with one row per token of each sequence. A void* points to fp32 or bf16.
// Everything else is fp32, and so are all sums. Each call computes the columns [begin, end) independently of other
// calls, so any split over threads gives bitwise the same result.
#pragma once

#include <cstdint>

namespace rwkv_peft {

constexpr int kMixes = 5;  // the inputs of decay, key, value, receptance and gate

// `count` rows from row `first`; each sequence has `tokens` rows.
struct Rows {
  int64_t width, tokens, first, count;
  const bool* starts = nullptr;  // for all rows: whether a text starts there, with zeros as predecessor; may be null
  const void* zeros = nullptr;   // (width), that predecessor
};

// out_m = x + (previous - x) * (base_m + amounts_m): interpolates between x and the token before it.
struct Lerp {
  Rows rows;
  const void* x;         // all rows, like every void* here
  const void* last;      // (sequences, width): the predecessor of each sequence's first token
  const float* base;     // (mixes, width)
  const float* amounts;  // (mixes, count, width), or null for none
  int64_t mixes;
  void* out[kMixes];
};

// First half of Lerp's gradient: everything except adding each token's part for its predecessor.
struct LerpBackward {
  Rows rows;
  const void *x, *last;  // read if amounts or grad_base is not null
  const float* base;
  float* amounts;  // as in Lerp; overwritten with its gradient
  int64_t mixes;
  const void* grad_out[kMixes];
  float* grad_self;      // (count, width): the gradient for the row's own x
  float* grad_previous;  // (count, width): the gradient for the token before it
  float* grad_base;      // (mixes, width), accumulated; may be null
};

// Second half: grad_x of these rows. Rows are processed from the last to the first.
struct ShiftBackward {
  Rows rows;
  const float *grad_self, *grad_previous;
  const float* grad_mixed;  // (count, width), gradient of another mix with `mixed_base` and no amounts; may be null
  const float* mixed_base;  // (width)
  const void *x, *last;     // read if grad_mixed_base is not null
  float* grad_mixed_base;   // (width), accumulated; may be null
  float* carry;  // (width): in: grad_previous of the row after these rows; out: grad_previous of their first row
  void *grad_x, *grad_last;
};

// out = (normalized y * weight + bias) * silu(gate), where y is normalized over each `group` of columns. All rows.
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
  float *grad_weight, *grad_bias;  // (width), accumulated; may both be null
};

// The loops for one element type.
struct MixLoops {
  void (*lerp)(const Lerp&, int64_t begin, int64_t end);
  void (*lerp_to_fp32)(const Lerp&, int64_t begin, int64_t end);  // out is float* and has only these rows
  void (*lerp_backward)(const LerpBackward&, int64_t begin, int64_t end);
  void (*shift_backward)(const ShiftBackward&, int64_t begin, int64_t end);
  void (*gated_norm)(const GatedNorm&, int64_t begin, int64_t end);  // complete groups
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
