// WKV6 on the CPU, for fp32 and bf16 elements and any head size.
#pragma once

#include "../../cpu_levels.h"
#include "../wkv6_call.h"
#include "kernels.h"

namespace rwkv_peft {

extern const Device kCpuDevice;

void step_cpu(const Launch& n, const Step& a);

CpuLevels<CpuKernels>& cpu_levels();

}  // namespace rwkv_peft
