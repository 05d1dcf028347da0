// WKV6's CPU kernels for any processor: vectors of four floats, which compilers map to SSE2 or NEON.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

#define WKV6_LANES 4
#define WKV6_ROWS 4
#include "passes.h"

const rwkv_peft::CpuKernels rwkv_peft::kPlainKernels = WKV6_KERNELS("plain");
