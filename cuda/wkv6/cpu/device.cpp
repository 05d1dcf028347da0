// WKV6 on the CPU: splits a call into pieces, and runs the best kernels for this processor on several threads.
#include "device.h"

#include <algorithm>
#include <vector>

#include <omp.h>

#include "kernels.h"

namespace rwkv_peft {
namespace {

// With fewer state elements, starting threads costs more time than the step itself.
constexpr int64_t kStepOfOneThread = 1 << 16;

// How one call is split into pieces: `group` heads together, and their channels in `tiles` parts of `width` channels.
struct Cut {
  int64_t heads, padded, group, width;

  // Each part becomes `kinds` pieces. Processing adjacent heads together reads longer stretches of memory, and with
  // wide parts each loaded value is used for more channels. But there should be at least one piece for every thread.
  Cut(const Launch& n, int64_t kinds)
      : heads(n.batch * n.heads), padded((n.head_size + kTile - 1) / kTile * kTile), group(1), width(padded) {
    const int64_t threads = omp_get_max_threads();
    while (2 * group <= kMostHeads && heads >= 2 * group * threads) group *= 2;
    while (width > kTile && heads * tiles() * kinds < threads) width = rounded_up(width / 2, kTile);
  }

  static int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

  int64_t groups() const { return (heads + group - 1) / group; }
  int64_t tiles() const { return (padded + width - 1) / width; }
  int64_t parts() const { return groups() * tiles(); }

  // The channels of a part are both value and key channels; backward() may keep only one kind.
  Piece part(int64_t i) const {
    const int64_t head = i / tiles() * group, channel = i % tiles() * width;
    const Channels channels{channel, std::min(channel + width, padded)};
    return {head, std::min(head + group, heads), channels, channels};
  }
};

int64_t floats_of_thread(int64_t scratch) { return Cut::rounded_up(scratch, kTile); }

template <typename Work>
void run_pieces(int64_t pieces, float* scratch, int64_t floats, const Work& work) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < pieces; ++i) work(i, scratch + omp_get_thread_num() * floats_of_thread(floats));
}

int64_t forward_scratch(const Launch& n) {
  return omp_get_max_threads() * floats_of_thread(cpu_levels().chosen().forward_scratch(n, kMostHeads));
}

int64_t backward_scratch(const Launch& n) {
  return omp_get_max_threads() * floats_of_thread(cpu_levels().chosen().backward_scratch(n, kMostHeads));
}

void forward(const Launch& n, const Forward& a) {
  const CpuKernels& kernels = cpu_levels().chosen();
  const Cut cut(n, 1);
  run_pieces(cut.parts(), a.scratch, kernels.forward_scratch(n, kMostHeads), [&](int64_t i, float* scratch) {
    kernels.forward(n, a, cut.part(i), scratch);
  });
}

// The gradients of value and key channels share work. If there are more threads than heads, they are separate pieces.
void backward(const Launch& n, const Backward& a) {
  const CpuKernels& kernels = cpu_levels().chosen();
  const int64_t kinds = n.batch * n.heads >= omp_get_max_threads() ? 1 : 2;
  const Cut cut(n, kinds);
  run_pieces(cut.parts() * kinds, a.scratch, kernels.backward_scratch(n, kMostHeads), [&](int64_t i, float* scratch) {
    Piece piece = cut.part(i / kinds);
    if (kinds == 2) (i % 2 == 0 ? piece.values : piece.keys) = {0, 0};
    kernels.backward(n, a, piece, scratch);
  });
}

}  // namespace

const Device kCpuDevice{forward, backward, forward_scratch, backward_scratch};

void step_cpu(const Launch& n, const Step& a) {
  const CpuKernels& kernels = cpu_levels().chosen();
  const int64_t heads = n.batch * n.heads, floats = kernels.step_scratch(n);
  std::vector<float> scratch(omp_get_max_threads() * floats);
#pragma omp parallel for if (heads * n.head_size * n.head_size > kStepOfOneThread)
  for (int64_t head = 0; head < heads; ++head) {
    kernels.step(n, a, head, scratch.data() + omp_get_thread_num() * floats);
  }
}

CpuLevels<CpuKernels>& cpu_levels() {
#ifdef __x86_64__
  static CpuLevels<CpuKernels> levels(&kAvx512Kernels, &kAvx2Kernels, kPlainKernels);
#else
  static CpuLevels<CpuKernels> levels(nullptr, nullptr, kPlainKernels);
#endif
  return levels;
}

}  // namespace rwkv_peft
