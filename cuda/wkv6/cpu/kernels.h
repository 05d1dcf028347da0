// The functions that are compiled once for each instruction set: the work of one thread on one piece.
#pragma once

#include "../wkv6_call.h"

namespace rwkv_peft {

// Channels [first, last) of a head, in multiples of kTile. `last` may be greater than the head size.
struct Channels {
  int64_t first, last;

  bool empty() const { return first == last; }
};

// The columns of the state (value channels) are independent of each other, and so are the gradients of key channels. A
// piece is any range of value channels and any range of key channels, for some heads that are processed together. The
// result is bitwise the same for any split.
struct Piece {
  int64_t first_head, last_head;  // [first, last) of batch * heads + head
  Channels values, keys;
};

constexpr int64_t kTile = 16;
constexpr int64_t kMostHeads = 4;  // in a piece

// One token in generation; the state is updated in place.
struct Step {
  const void *r, *k, *v;  // (B, 1, H, N)
  const float *w, *u;     // (B, 1, H, N), (H, N)
  void* y;                // (B, 1, H, N)
  float* state;           // (B, H, N, N)
};

struct CpuKernels {
  const char* name;
  void (*forward)(const Launch&, const Forward&, const Piece&, float* scratch);    // uses `values` only
  void (*backward)(const Launch&, const Backward&, const Piece&, float* scratch);  // grad_v by values, the rest by keys
  void (*step)(const Launch&, const Step&, int64_t head, float* scratch);
  // The number of floats of scratch memory that each of the three needs, for a piece with `heads` heads.
  int64_t (*forward_scratch)(const Launch&, int64_t heads);
  int64_t (*backward_scratch)(const Launch&, int64_t heads);
  int64_t (*step_scratch)(const Launch&);
};

extern const CpuKernels kPlainKernels;
#ifdef __x86_64__
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace rwkv_peft
