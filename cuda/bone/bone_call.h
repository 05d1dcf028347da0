// Bone's two small block products, as bone_op.cpp calls them: raw pointers, no torch headers.
//
// Blocks are (groups, rows, r) with a contiguous last dimension. Each group has one r x r matrix:
//     mix     out[g] = x[g] + (x[g] + tile) matrix[g]        sum = the updates out - x, added over the groups
//     outer   out[g] = (left[g] + tile)^T right[g]
// Sums are in fp32. Calls for different groups or rows write to different memory, so threads can run them in parallel.
#pragma once

#include <cstdint>

namespace rwkv_peft {

struct Blocks {
  void* data;  // fp32 or bf16
  bool is_bf16;
  int64_t group_stride, row_stride;  // in elements
};

struct Mix {
  int64_t rows, r;        // r is a multiple of 16
  Blocks x, out;
  const float* matrices;  // (groups, r, r)
  const float* tile;      // (rows, r), added to every group before the product; may be null
  float* sum;             // (rows, r); may be null
};

struct Outer {
  int64_t rows, r;  // r is a multiple of 16
  Blocks left, right;
  const float* tile;  // (rows, r); may be null
  float* out;         // (groups, r, r)
};

// Number of rows that a kernel converts to fp32 at a time.
constexpr int64_t kPackedRows = 64;
constexpr int64_t kMixRows = 16;

struct BoneKernels {
  const char* name;
  // `buffer` has room for 2 * kPackedRows * r floats and is aligned to a cache line.
  void (*mix)(const Mix&, int64_t first_group, int64_t last_group, int64_t first_row, int64_t last_row, float* buffer);
  void (*outer)(const Outer&, int64_t group, float* buffer);
};

extern const BoneKernels kPlainBone;
#ifdef __x86_64__
extern const BoneKernels kAvx2Bone, kAvx512Bone;
#endif

}  // namespace rwkv_peft
