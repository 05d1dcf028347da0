// Bone's kernels for CPUs with AVX2 and FMA.
#include <stdint.h>
#include <string.h>

#include "bone_call.h"

#ifdef __x86_64__

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif

#define KERNELS kAvx2Bone
#define NAME "avx2"
#define LANES 8
#define ROWS 2
#include "bone_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
