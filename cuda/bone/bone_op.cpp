// rwkv_peft::mix_blocks and rwkv_peft::outer_blocks on the CPU. ops/bone/block_products.py registers their fake tensors
// and has the plain torch form.
#include <algorithm>
#include <new>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../cpu_levels.h"
#include "bone_call.h"

namespace rwkv_peft {
namespace {

using at::Tensor;

// Memory for floats, aligned to a cache line: loading a vector that crosses a line takes twice as long.
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<float*>(::operator new(count * sizeof(float), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

CpuLevels<BoneKernels>& levels() {
#ifdef __x86_64__
  static CpuLevels<BoneKernels> levels(&kAvx512Bone, &kAvx2Bone, kPlainBone);
#else
  static CpuLevels<BoneKernels> levels(nullptr, nullptr, kPlainBone);
#endif
  return levels;
}

Blocks blocks_of(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.dim() == 3 && x.sizes() == like.sizes() && x.stride(2) == 1, "bone: ", name,
              " must be (groups, rows, r) like the other blocks, with a contiguous last dimension; found ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "bone: ", name,
              " must be fp32 or bf16; found ", x.scalar_type());
  TORCH_CHECK(x.size(2) % 16 == 0, "bone: r must be a multiple of 16; found ", x.size(2));
  return {x.data_ptr(), x.scalar_type() == at::kBFloat16, x.stride(0), x.stride(1)};
}

const float* tile_of(const std::optional<Tensor>& tile, const Tensor& x) {
  if (!tile.has_value()) return nullptr;
  TORCH_CHECK(tile->dim() == 2 && tile->size(0) == x.size(1) && tile->size(1) == x.size(2) && tile->is_contiguous(),
              "bone: tile must be contiguous (", x.size(1), ", ", x.size(2), "); found ", tile->sizes());
  return tile->const_data_ptr<float>();
}

// Returns (out, sum). Without want_sum, sum has no rows.
std::tuple<Tensor, Tensor> mix_blocks(const Tensor& x, const Tensor& matrices, const std::optional<Tensor>& tile,
                                      bool want_sum, at::ScalarType dtype) {
  const int64_t groups = x.size(0), rows = x.size(1), r = x.size(2);
  TORCH_CHECK(matrices.dim() == 3 && matrices.size(0) == groups && matrices.size(1) == r && matrices.size(2) == r &&
                  matrices.is_contiguous(),
              "bone: matrices must be contiguous (", groups, ", ", r, ", ", r, "); found ", matrices.sizes());
  Tensor out = at::empty_like(x, x.options().dtype(dtype));
  Tensor sum = at::zeros({want_sum ? rows : 0, r}, x.options().dtype(at::kFloat));
  const Mix a{rows,
              r,
              blocks_of("x", x, x),
              blocks_of("out", out, x),
              matrices.const_data_ptr<float>(),
              tile_of(tile, x),
              want_sum ? sum.mutable_data_ptr<float>() : nullptr};
  const BoneKernels& kernel = levels().chosen();
  // To add up the updates, a thread must process its rows in all groups. Without a sum, groups are independent.
  const int64_t pieces = want_sum ? 1 : groups;
  const int64_t row_chunk = (rows + kPackedRows - 1) / kPackedRows;
  at::parallel_for(0, pieces * row_chunk, 1, [&](int64_t begin, int64_t end) {
    const Buffer buffer(2 * kPackedRows * r);
    for (int64_t piece = begin; piece < end;) {
      const int64_t group = piece / row_chunk, first = piece % row_chunk;
      const int64_t last = std::min(row_chunk, first + end - piece);
      kernel.mix(a, want_sum ? 0 : group, want_sum ? groups : group + 1, first * kPackedRows,
                 std::min(rows, last * kPackedRows), buffer.get());
      piece += last - first;
    }
  });
  return {out, sum};
}

Tensor outer_blocks(const Tensor& left, const Tensor& right, const std::optional<Tensor>& tile) {
  const int64_t groups = left.size(0), r = left.size(2);
  Tensor out = at::empty({groups, r, r}, left.options().dtype(at::kFloat));
  const Outer a{left.size(1),        r,   blocks_of("left", left, left), blocks_of("right", right, left),
                tile_of(tile, left), out.mutable_data_ptr<float>()};
  const BoneKernels& kernel = levels().chosen();
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer buffer(2 * kPackedRows * r);
    for (int64_t group = begin; group < end; ++group) kernel.outer(a, group, buffer.get());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkv_peft, m) {
  m.def(
      "mix_blocks(Tensor x, Tensor matrices, Tensor? tile, bool want_sum, ScalarType dtype)"
      " -> (Tensor out, Tensor sum)");
  m.def("outer_blocks(Tensor left, Tensor right, Tensor? tile) -> Tensor");
  // For tests: the supported instruction sets, best first, and the selection of one.
  m.def("bone_cpu_levels() -> str[]", [] { return levels().names(); });
  m.def("bone_use_cpu_level(str level) -> str", [](const std::string& name) { return levels().use(name); });
}

TORCH_LIBRARY_IMPL(rwkv_peft, CPU, m) {
  m.impl("mix_blocks", mix_blocks);
  m.impl("outer_blocks", outer_blocks);
}

}  // namespace rwkv_peft
