// WKV6's CPU kernels for CPUs with AVX2 and FMA.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef __x86_64__

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif

#define WKV6_LANES 8
#define WKV6_ROWS 4
#include "passes.h"

const rwkv_peft::CpuKernels rwkv_peft::kAvx2Kernels = WKV6_KERNELS("avx2");

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
