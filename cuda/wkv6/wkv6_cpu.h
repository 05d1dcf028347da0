// The CPU's two sweeps, for fp32 and bf16 elements and any head size.
#pragma once

#include "wkv6_sweeps.h"

namespace rwkv_peft {

extern const Sweeps kCpuSweeps;

}  // namespace rwkv_peft
