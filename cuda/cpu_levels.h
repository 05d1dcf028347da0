// Kernels compiled for several instruction sets, and the choice of one that this processor supports.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace rwkv_peft {

// `Kernels` has a member `name`: "avx512", "avx2" or "plain". Thread-safe.
template <typename Kernels>
class CpuLevels {
 public:
  // On processors other than x86-64, `avx512` and `avx2` are ignored and may be null.
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

  // The best supported kernels, unless `use` selected others.
  const Kernels& chosen() const { return *chosen_.load(); }

  // The instruction sets that this processor supports, best first.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_) names.push_back(kernels->name);
    return names;
  }

  // Selects the kernels for all later calls and returns the name of the previous ones. If the processor does not
  // support them, returns "" and changes nothing.
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
