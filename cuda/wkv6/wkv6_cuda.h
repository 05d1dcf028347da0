// CUDA's two sweeps, for fp32, bf16 and fp16 elements and head sizes 32, 64 and 128.
#pragma once

#include "wkv6_sweeps.h"

namespace rwkv_peft {

// Launched on Launch::stream of the current device; throw std::runtime_error.
extern const Sweeps kCudaSweeps;

}  // namespace rwkv_peft
