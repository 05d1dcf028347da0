// The loops for any processor, and the choice among those that this one can run.
#include <atomic>
#include <string>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "mix_kernels.h"
#include "mix_loops.h"

namespace rwkv_peft {

const MixKernels kPlainMixes = MIX_KERNELS("plain");

namespace {

std::vector<const MixKernels*> supported() {
  std::vector<const MixKernels*> found;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Mixes);
  }
  if (avx2) found.push_back(&kAvx2Mixes);
#endif
  found.push_back(&kPlainMixes);
  return found;
}

std::atomic<const MixKernels*>& chosen() {
  static std::atomic<const MixKernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const MixLoops& mix_loops(bool bf16) { return bf16 ? chosen().load()->bf16 : chosen().load()->fp32; }

std::vector<std::string> mix_levels() {
  std::vector<std::string> names;
  for (const MixKernels* kernels : supported()) names.push_back(kernels->name);
  return names;
}

std::string use_mix_level(const std::string& name) {
  for (const MixKernels* kernels : supported()) {
    if (kernels->name == name) return chosen().exchange(kernels)->name;
  }
  return "";
}

}  // namespace rwkv_peft
