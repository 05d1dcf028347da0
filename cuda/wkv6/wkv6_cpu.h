// WKV6 on CPU, for fp32 and bf16 elements and any head size.
#pragma once

#include <string>
#include <vector>

#include "wkv6_call.h"
#include "wkv6_cpu_kernels.h"

namespace rwkv_peft {

extern const Device kCpuDevice;

void step_cpu(const Launch& n, const Step& a);

// The sets of kernels that this processor can run, best first; calls take the first unless told otherwise.
std::vector<std::string> cpu_levels();

// Makes all later calls take this one; returns the one before, or "" and does nothing if it cannot be run here.
std::string use_cpu_level(const std::string& name);

}  // namespace rwkv_peft
