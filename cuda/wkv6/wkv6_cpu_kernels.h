// What is compiled once per instruction set: the work of one thread on one piece.
#pragma once

#include "wkv6_call.h"

namespace rwkv_peft {

// Channels [first, last) of a head, in multiples of kTile; the last one may reach beyond the head size.
struct Channels {
  int64_t first, last;

  bool empty() const { return first == last; }
};

// State columns (value channels) never mix, and neither do the gradients of two key channels. So a piece is any part of
// either, of some heads that are gone through side by side, and how the work is cut changes no bit of the result.
struct Piece {
  int64_t first_head, last_head;  // [first, last) of batch * heads + head
  Channels values, keys;
};

constexpr int64_t kTile = 16;
constexpr int64_t kMostHeads = 4;  // of a piece

// The step for generation: one token, the state updated in place.
struct Step {
  const void *r, *k, *v;  // (B, 1, H, N)
  const float *w, *u;     // (B, 1, H, N), (H, N)
  void* y;                // (B, 1, H, N)
  float* state;           // (B, H, N, N)
};

struct CpuKernels {
  const char* name;
  void (*forward)(const Launch&, const Forward&, const Piece&, float* scratch);    // all of `values`
  void (*backward)(const Launch&, const Backward&, const Piece&, float* scratch);  // grad_v by values, the rest by keys
  void (*step)(const Launch&, const Step&, int64_t head, float* scratch);
  // Floats of scratch that each of the three uses, for so many heads of a piece.
  int64_t (*forward_scratch)(const Launch&, int64_t heads);
  int64_t (*backward_scratch)(const Launch&, int64_t heads);
  int64_t (*step_scratch)(const Launch&);
};

extern const CpuKernels kPlainKernels;
#ifdef __x86_64__
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace rwkv_peft
