// WKV6's CPU kernels for CPUs with AVX-512 (F, BW, DQ, VL).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef __x86_64__

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")
#endif

#define WKV6_LANES 16
#define WKV6_ROWS 8
#include "passes.h"

const rwkv_peft::CpuKernels rwkv_peft::kAvx512Kernels = WKV6_KERNELS("avx512");

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
