// WKV6 on CUDA, for fp32, bf16 and fp16 elements and head sizes 32, 64 and 128.
#pragma once

#include "wkv6_call.h"

namespace rwkv_peft {

// Launched on Launch::stream of the current device; throws std::runtime_error.
extern const Device kCudaDevice;

}  // namespace rwkv_peft
