// Kernels that are compiled for several instruction sets, and the choice among those that this processor can run.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace rwkv_peft {

// `Kernels` has a member `name`: "avx512", "avx2" or "plain". Thread-safe.
template <typename Kernels>
class CpuLevels {
 public:
  // On other processors than x86-64 `avx512` and `avx2` are not looked at and may be null.
  CpuLevels(const Kernels* avx512, const Kernels* avx2, const Kernels& plain) {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      supported_.push_back(avx512);
    }
    if (has_avx2) supported_.push_back(avx2);
#endif
    supported_.push_back(&plain);
    chosen_ = supported_.front();
  }

  // The best, unless `use` said otherwise.
  const Kernels& chosen() const { return *chosen_.load(); }

  // What this processor can run, best first.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_) names.push_back(kernels->name);
    return names;
  }

  // Makes all later calls take this one; returns the one before, or "" and does nothing if it cannot be run here.
  std::string use(const std::string& name) {
    for (const Kernels* kernels : supported_) {
      if (kernels->name == name) return chosen_.exchange(kernels)->name;
    }
    return "";
  }

 private:
  std::vector<const Kernels*> supported_;
  std::atomic<const Kernels*> chosen_;
};

}  // namespace rwkv_peft
