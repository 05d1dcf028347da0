// Bone's kernels for CPUs with AVX-512.
#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define KERNELS kAvx512Kernels
#define LANES 16
#define ROWS 4
#include "bone_kernels.h"
#endif
