// Bone's kernels for CPUs with AVX2.
#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define KERNELS kAvx2Kernels
#define LANES 8
#define ROWS 2
#include "bone_kernels.h"
#endif
