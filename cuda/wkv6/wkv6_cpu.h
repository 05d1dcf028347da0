// WKV6 on CPU, for fp32 and bf16 elements and any head size.
#pragma once

#include "wkv6_call.h"

namespace rwkv_peft {

extern const Device kCpuDevice;

}  // namespace rwkv_peft
